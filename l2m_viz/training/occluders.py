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
from l2m_viz.geometry import (
    HW,
    inside_image,
    invert_pose,
    pixel_grid,
    plane_homography,
    ray_directions,
    sample_image,
    to_normalized,
    to_pixel,
)
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
    views = [{name: getattr(batch, name)[i] for name in _NEEDED} for i in range(len(batch.photos))]
    found = False
    for i, seed in enumerate(batch.seeds.tolist()):
        rng = np.random.default_rng([seed % 2**64, _DOMAIN])
        if rng.random() >= cfg.share:
            continue
        found = True
        for _ in range(rng.integers(1, cfg.num, endpoint=True)):
            occluder = draw_occluder(views[i]["image_A"], views[i]["depth_A"], views[i]["valid_A"],
                                     views[i]["K_A"], cfg, rng)  # fmt: skip
            views[i] = put_before(views[i], occluder)
    if not found:
        return batch
    return replace(batch, **{name: torch.stack([view[name] for view in views]) for name in _CHANGED})


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
    rays = ray_directions(pixel_grid(hw), K)[alpha > 0]
    # z = d / (n . ray) is largest where n . ray is smallest: `nearer` holds there
    steepest = (rays @ normal).min().clamp(min=0.1) if len(rays) else torch.ones(())
    distance = (nearest * rng.uniform(*cfg.nearer) * steepest).item()
    return Occluder(alpha, _color(image, rng), normal, distance)


def put_before(view: _Views, occluder: Occluder) -> _Views:
    """One pair with one more thing in it, hidden where the scene is nearer."""
    K_A, K_B, T = view["K_A"], view["K_B"], view["T_A_to_B"]
    A_to_B = plane_homography(K_A, K_B, T, occluder.normal, occluder.distance)
    B_to_A = torch.linalg.inv(A_to_B)
    normal_B = T[:3, :3] @ occluder.normal
    distance_B = occluder.distance + (normal_B @ T[:3, 3]).item()
    seen_A = _Seen(occluder, None, A_to_B, K_A, occluder.normal, occluder.distance)
    seen_B = _Seen(occluder, B_to_A, B_to_A, K_B, normal_B, distance_B)
    changes_A, _ = _changes(view, "A", "B", seen_A, seen_B, T)
    changes_B, front_B = _changes(view, "B", "A", seen_B, seen_A, invert_pose(T))
    masks = {name: view[name] & ~front_B for name in ("hole_mask_B", "inpainted_mask_B")}
    return view | changes_A | changes_B | masks


@dataclass(frozen=True)
class _Seen:
    """An occluder as one camera sees it: its plane, and where pixels are in A (None: this is A) and in the other."""

    occluder: Occluder
    to_A: Float[Tensor, "3 3"] | None
    to_other: Float[Tensor, "3 3"]
    K: Float[Tensor, "3 3"]
    normal: Float[Tensor, " 3"]
    distance: float

    def depth(self, points_px: Float[Tensor, "h w 2"]) -> Float[Tensor, "h w"]:
        """Z of the plane at pixels; not positive where it lies behind the camera."""
        slope = _linear(self.normal @ torch.linalg.inv(self.K), points_px)  # n . ray
        return self.distance / torch.where(slope.abs() < 1e-6, -1e-6, slope)

    def in_A(self, points_px: Float[Tensor, "h w 2"]) -> Float[Tensor, "h w 2"]:
        """Where pixels lie on the picture of the thing, normalised."""
        mapped = points_px if self.to_A is None else _apply(self.to_A, points_px)
        return to_normalized(mapped, (self.occluder.alpha.shape[0], self.occluder.alpha.shape[1]))

    def alpha(self, in_A: Float[Tensor, "h w 2"]) -> Float[Tensor, "h w"]:
        return sample_image(self.occluder.alpha, in_A, padding="zeros")


def _changes(
    view: _Views, one: str, two: str, seen: _Seen, others: _Seen, pose: Float[Tensor, "4 4"]
) -> tuple[_Views, Bool[Tensor, "h w"]]:
    """What becomes of one view, its truth towards the other included, and where the thing is in front."""
    depth, valid = view[f"depth_{one}"], view[f"valid_{one}"]
    hw: HW = (depth.shape[0], depth.shape[1])
    grid = pixel_grid(hw)
    in_A, z = seen.in_A(grid), seen.depth(grid)
    alpha = seen.alpha(in_A) * ((z > 0) & (~valid | (z < depth)))
    front = alpha >= 0.5
    # Of the thing, the other camera sees what lies before the scene there.
    to_other = _apply(seen.to_other, grid)
    target = to_normalized(to_other, hw)
    scene = torch.where(view[f"valid_{two}"], view[f"depth_{two}"], torch.inf)
    z_there = others.depth(to_other)
    shown = inside_image(target) & (z_there > 0) & (z_there < sample_image(scene, target, mode="nearest"))
    # Of the scene, it sees what it saw, but for what lies behind the thing.
    old = view[f"warp_{one}_to_{two}"]
    old_px = to_pixel(old, hw)
    plane = others.depth(old_px)
    behind = depth * _linear(pose[2, :3] @ torch.linalg.inv(view[f"K_{one}"]), grid) + pose[2, 3]
    hidden = (others.alpha(others.in_A(old_px)) >= 0.5) & (plane > 0) & (plane < behind)
    covisible = view[f"covisibility_{one}_to_{two}"] & ~hidden
    color = sample_image(seen.occluder.color, in_A)
    changes = {
        f"image_{one}": torch.lerp(view[f"image_{one}"], color, alpha[..., None]),
        f"depth_{one}": torch.where(front, z, depth),
        f"valid_{one}": valid | front,
        f"warp_{one}_to_{two}": torch.where(front[..., None], target, old),
        f"covisibility_{one}_to_{two}": torch.where(front, shown, covisible),
    }
    return changes, front


def _linear(coefficients: Float[Tensor, " 3"], points_px: Float[Tensor, "h w 2"]) -> Float[Tensor, "h w"]:
    a, b, c = coefficients.tolist()
    x, y = points_px.unbind(-1)
    return a * x + b * y + c


def _apply(homography: Float[Tensor, "3 3"], points_px: Float[Tensor, "h w 2"]) -> Float[Tensor, "h w 2"]:
    """Pixels through a homography; what goes behind the camera is far outside every image."""
    x, y, w = (_linear(row, points_px) for row in homography)
    before = w > 1e-6
    mapped = torch.stack([x, y], dim=-1) / torch.where(before, w, 1.0)[..., None]
    return torch.where(before[..., None], mapped, _NOWHERE)


_NOWHERE = -1e4  # px: finite, as truth has to be where nothing is covisible


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
        base, slopes = rng.random(3), rng.normal(0, 0.15, 2)
        y, x = (np.linspace(-1, 1, side)[:, None] for side in (height, width))
        shade = slopes[0] * y + slopes[1] * x.T
        return torch.from_numpy((base + shade[..., None]).clip(0, 1).astype(np.float32))
    gain, order = rng.uniform(0.4, 1.6, 3).astype(np.float32), rng.permutation(3)
    shifts = int(rng.integers(height)), int(rng.integers(width))
    turned = image.flip(0, 1).roll(shifts, (0, 1))[..., order.copy()]
    return (turned * torch.from_numpy(gain)).clamp(0, 1)
