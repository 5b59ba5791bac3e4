"""Occluders: flat things of another colour before the scene, thin ones above all.

A lifted photo has depth edges where its segments end, and few segments are thin. Bars, wires, rings and discs, each on
a plane of its own nearer than what it hides, add edges that are exact in both views: a plane moves by the homography
that it induces, so where it went, what it hides and what it shows follow in closed form (FlyingThings3D, Mayer et al.,
CVPR 2016, does the same with solids).
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.errors import L2MError
from l2m_viz.geometry import HW, invert_pose, pixel_grid, plane_homography, ray_directions
from l2m_viz.parallel import run_kernel
from l2m_viz.training.stream import PairBatch

_DOMAIN = 0x6F63636C  # "occl": the seed of a pair may serve here, too
_Views = dict[str, Tensor]  # the fields of one pair that an occluder changes or needs
_CHANGED = (
    "image_A", "image_B", "depth_A", "depth_B", "valid_A", "valid_B", "hole_mask_B", "inpainted_mask_B",
    "warp_A_to_B", "covisibility_A_to_B", "warp_B_to_A", "covisibility_B_to_A",
)  # fmt: skip
_NEEDED = (*_CHANGED, "K_A", "K_B", "T_A_to_B")


@dataclass(frozen=True)
class OccluderCfg:
    """Which pairs get occluders, how many and how thick."""

    # Share of the pairs.
    share: float = 0.0
    # At most so many, each on its own plane.
    num: int = 4
    # Thickness of bars and rings over the image's shorter side; drawn evenly on a logarithmic scale.
    thickness: tuple[float, float] = (0.01, 0.08)
    # Depth of the plane over that of the nearest thing behind it.
    nearer: tuple[float, float] = (0.4, 0.92)
    # Largest angle between the plane's normal and the first camera's axis.
    tilt_deg: float = 40.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise L2MError("OccluderCfg share", expected="a share, 0 to 1", got=f"{self.share:g}")
        if self.num < 1:
            raise L2MError("OccluderCfg num", expected="at least 1", got=str(self.num))
        for name in ("thickness", "nearer"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise L2MError(f"OccluderCfg {name}", expected="0 < low <= high <= 1", got=f"({low}, {high})")
        if not 0 <= self.tilt_deg < 80:
            expected = "from 0 to below 80 degrees: an edge-on plane shows nothing"
            raise L2MError("OccluderCfg tilt_deg", expected=expected, got=f"{self.tilt_deg:g}")


@dataclass(frozen=True)
class Occluder:
    """A flat thing as the first view sees it.

    Attributes:
        alpha: How much of each pixel of A it covers; it is there where that is a half or more.
        color: Its colour, for all of A.
        normal: Of its plane n . X = d in A's camera.
        distance: The plane's d.
    """

    alpha: Float[Tensor, "h w"]
    color: Float[Tensor, "h w 3"]
    normal: Float[Tensor, " 3"]
    distance: float


def with_occluders(batch: PairBatch, cfg: OccluderCfg) -> PairBatch:
    """Put flat things before the scenes of some pairs; colours, depths and truth of both views are then theirs.

    What a pair gets is a function of its seed and the settings alone.
    """
    rngs = [np.random.default_rng([seed % 2**64, _DOMAIN]) for seed in batch.seeds.tolist()]
    chosen = [i for i, rng in enumerate(rngs) if rng.random() < cfg.share]
    if not chosen:
        return batch
    batch = replace(batch, **{name: getattr(batch, name).clone() for name in _CHANGED})
    for i in chosen:
        view = {name: getattr(batch, name)[i] for name in _NEEDED}
        for _ in range(rngs[i].integers(1, cfg.num, endpoint=True)):
            scene = view["image_A"], view["depth_A"], view["valid_A"], view["K_A"]
            put_into(view, draw_occluder(*scene, cfg, rngs[i]))
    return batch


def draw_occluder(
    image: Float[Tensor, "h w 3"],
    depth: Float[Tensor, "h w"],
    valid: Bool[Tensor, "h w"],
    K: Float[Tensor, "3 3"],
    cfg: OccluderCfg,
    rng: np.random.Generator,
) -> Occluder:
    """Draw a shape, its colour and its plane, nearer than what the shape hides."""
    hw: HW = (image.shape[0], image.shape[1])
    alpha = torch.from_numpy(_shape(hw, cfg, rng))
    behind = depth[(alpha > 0) & valid]
    nearest = behind.min() if len(behind) else depth[valid].min() if valid.any() else torch.ones(())
    tilt, turn = math.radians(cfg.tilt_deg) * math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi)
    sine = math.sin(tilt)
    normal = torch.tensor([sine * math.cos(turn), sine * math.sin(turn), math.cos(tilt)], dtype=torch.float32)
    rays = ray_directions(pixel_grid(hw)[alpha > 0], K)
    # z = d / (n . ray) is largest where n . ray is smallest: `nearer` holds there
    steepest = (rays @ normal).min().clamp(min=0.1) if len(rays) else torch.ones(())
    distance = (nearest * rng.uniform(*cfg.nearer) * steepest).item()
    return Occluder(alpha, _color(image, rng), normal, distance)


def put_into(view: _Views, occluder: Occluder) -> None:
    """Put one more thing into a pair, hidden where the scene is nearer: in place, maps contiguous and on the CPU."""
    K_A, K_B, T = view["K_A"], view["K_B"], view["T_A_to_B"]
    A_to_B = plane_homography(K_A, K_B, T, occluder.normal, occluder.distance)
    B_to_A = torch.linalg.inv(A_to_B).contiguous()  # for columns the kernel would be compiled once more
    normal_B = T[:3, :3] @ occluder.normal
    distance_B = occluder.distance + (normal_B @ T[:3, 3]).item()
    corners = _corners(occluder.alpha)
    box_A, box_B = _box(corners), _box(corners @ A_to_B.T)
    seen_A = _Seen(torch.eye(3), A_to_B, _plane(occluder.normal, K_A, occluder.distance), box_A)
    seen_B = _Seen(B_to_A, B_to_A, _plane(normal_B, K_B, distance_B), box_B)
    before = {name: view[name].clone() for name in ("depth_A", "valid_A", "depth_B", "valid_B")}
    _occlude(view, before, occluder, ("A", "B"), (seen_A, seen_B), T)
    front_B = _occlude(view, before, occluder, ("B", "A"), (seen_B, seen_A), invert_pose(T))
    for name in ("hole_mask_B", "inpainted_mask_B"):
        view[name] &= ~front_B


@dataclass(frozen=True)
class _Seen:
    """An occluder as one camera sees it: homographies to A's pixels and to the other view's, its plane and its box.

    With the plane's first three numbers l and the last one d, its depth at pixel p is d / (l . p). Left, top, right and
    bottom of the box hold all of it.
    """

    to_A: Float[Tensor, "3 3"]
    to_other: Float[Tensor, "3 3"]
    plane: Float[Tensor, " 4"]
    box: Float[Tensor, " 4"]


def _corners(alpha: Float[Tensor, "h w"]) -> Float[Tensor, "4 3"]:
    """Corners of a rectangle around all that is covered and what bilinear sampling spreads of it, homogeneous."""
    rows, columns = alpha.any(dim=1).nonzero().flatten(), alpha.any(dim=0).nonzero().flatten()
    if not len(rows):
        return torch.zeros(4, 3)
    left, right, top, bottom = (int(i) for i in (columns[0] - 1, columns[-1] + 2, rows[0] - 1, rows[-1] + 2))
    return torch.tensor(
        [(left, top, 1), (right, top, 1), (left, bottom, 1), (right, bottom, 1)], dtype=torch.float32
    )


def _box(corners: Float[Tensor, "4 3"]) -> Float[Tensor, " 4"]:
    """The box of a quadrangle given by homogeneous corners; everywhere if a part of it lies behind the camera."""
    if not (corners[:, 2] > 1e-3).all():
        return torch.tensor([-torch.inf, -torch.inf, torch.inf, torch.inf])
    points = corners[:, :2] / corners[:, 2:]
    return torch.cat([points.amin(dim=0) - 1e-2, points.amax(dim=0) + 1e-2])


def _plane(normal: Float[Tensor, " 3"], K: Float[Tensor, "3 3"], distance: float) -> Float[Tensor, " 4"]:
    return torch.cat([normal @ torch.linalg.inv(K), torch.tensor([distance])])


def _occlude(
    view: _Views,
    before: _Views,
    occluder: Occluder,
    sides: tuple[str, str],
    seen: tuple[_Seen, _Seen],
    pose: Tensor,
) -> Bool[Tensor, "h w"]:
    """Change one view, its truth towards the other included; return where the thing is in front."""
    from l2m_viz.training._occlude import occlude

    (one, two), (own, others) = sides, seen
    names = (
        f"image_{one}",
        f"depth_{one}",
        f"valid_{one}",
        f"warp_{one}_to_{two}",
        f"covisibility_{one}_to_{two}",
    )
    behind = torch.cat([pose[2, :3] @ torch.linalg.inv(view[f"K_{one}"]), pose[2, 3:]])
    front = torch.empty_like(view[f"valid_{one}"])
    arrays = (
        *(view[name] for name in names), before[f"depth_{two}"], before[f"valid_{two}"], occluder.alpha, occluder.color,
        own.to_A, own.to_other, others.to_A, own.plane, others.plane, behind,
        own.box, others.box, front,
    )  # fmt: skip
    run_kernel(occlude, *(array.numpy() for array in arrays))
    return front


def _shape(hw: HW, cfg: OccluderCfg, rng: np.random.Generator) -> np.ndarray:
    """Coverage (H, W) of a bar, several bars side by side, a bent wire, a ring or a disc."""
    side = min(hw)
    low, high = np.log(cfg.thickness)
    thickness = max(1, round(side * math.exp(rng.uniform(low, high))))
    canvas = np.zeros(hw, np.uint8)
    middle = rng.random(2) * (hw[1], hw[0])
    kind = rng.choice(("bar", "bars", "wire", "ring", "disc"), p=(0.3, 0.25, 0.2, 0.1, 0.15))
    if kind in ("bar", "bars"):
        angle, half = rng.uniform(0, math.pi), side * rng.uniform(0.15, 0.7)
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]]) * thickness * rng.uniform(1.7, 4)
        for number in range(1 if kind == "bar" else rng.integers(2, 7)):
            start = middle + number * across
            _line(canvas, [start - half * along, start + half * along], thickness)
    elif kind == "wire":
        joints = middle + np.cumsum(rng.normal(0, 0.2 * side, (rng.integers(3, 6), 2)), axis=0)
        _line(canvas, joints, thickness)
    else:
        axes = side * rng.uniform(0.05, 0.25, 2)
        angle, thick = rng.uniform(0, 180), -1 if kind == "disc" else thickness
        cv2.ellipse(canvas, _rounded(middle), _rounded(axes), angle, 0, 360, 255, thick, cv2.LINE_AA)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return canvas.astype(np.float32) / 255


def _line(canvas: np.ndarray, points: "np.ndarray | list[np.ndarray]", thickness: int) -> None:
    cv2.polylines(canvas, [np.round(points).astype(np.int32)], False, 255, thickness, cv2.LINE_AA)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _rounded(pair: np.ndarray) -> tuple[int, int]:
    return round(pair[0]), round(pair[1])


def _color(image: Float[Tensor, "h w 3"], rng: np.random.Generator) -> Float[Tensor, "h w 3"]:
    """One colour that shades off, or the photo upside down in other colours."""
    height, width = image.shape[:2]
    if rng.random() < 0.5:
        base, slopes = (values.astype(np.float32) for values in (rng.random(3), rng.normal(0, 0.15, 2)))
        y, x = (np.linspace(-1, 1, side, dtype=np.float32)[:, None] for side in (height, width))
        shade = slopes[0] * y + slopes[1] * x.T
        return torch.from_numpy((base + shade[..., None]).clip(0, 1))
    gain, order = rng.uniform(0.4, 1.6, 3).astype(np.float32), rng.permutation(3)
    shifts = int(rng.integers(height)), int(rng.integers(width))
    turned = image.flip(0, 1).roll(shifts, (0, 1))[..., order.copy()]
    return (turned * torch.from_numpy(gain)).clamp(0, 1)
