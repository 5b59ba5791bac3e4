"""Another light on a lifted photo: point lights that cast shadows, ambient light, and the camera's response to it.

What light the photo was taken in is unknown, so its colours stand for those of the surface, and its depth for the
surface itself. At a point P with unit normal n, with d_i from P to light i, the light that comes in is

    f = ambient + sum_i color_i energy_i visible_i max(0, n . d_i / |d_i|) / max(|d_i|, min_distance)^2

and the pixel becomes min(1, image (exposure white_balance f)^(1 / 2.2))^gamma: photos store about the 2.2th root of
light, so what multiplies the light in front of the lens multiplies the stored value by its 2.2th root. A pixel without
depth gets the ambient light alone, as if it were infinitely far; a black hole stays black.

Shadows: the depth map is marched on the screen from the pixel towards the light. A surface hides the light where the
ray runs behind it by less than a thickness (no one knows where its back is); a light's radius softens the edge. The
samples of neighbouring pixels are staggered in a 4 x 4 pattern, and a small filter that stops at depth edges averages
that pattern out of the shadows; neither the light nor the photo's own texture is filtered.

Symbols: ``w`` is inverse depth, affine in pixels on any plane; (sx, sy) its slopes per pixel. The plane through a pixel
(u, v) has the normal -(fx sx, fy sy, w - sx (u - cx) - sy (v - cy)), which faces the camera. Lights live in world
coordinates, those of the photo's own camera, so that one lighting serves any view of the scene.

The ranges follow L2M relight.py, which hands a mesh to Blender (x right, y forward, z up, W of energy).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data.files import Saved
from l2m_viz.data.images import require_image
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.geometry import HW, Camera, pixel_grid, transform_points
from l2m_viz.lifting import _relight
from l2m_viz.lifting.scene import NEAR
from l2m_viz.parallel import run_kernel

Range = tuple[float, float]
DISPLAY_GAMMA = 2.2
# Where each pixel of a 4 x 4 block starts within the first step of its march: all sixteenths, neighbours far apart.
_STAGGER = (np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], np.float32) + 0.5) / 16
# A box of 4 px on a box of 2 px: of all filters 5 px wide the one that leaves nothing of a pattern of period 4.
_UNSTAGGER = np.array([2, 2, 1], np.float32) / 8


@dataclass(frozen=True)
class RelightCfg:
    """Ranges of random lightings. Lengths are multiples of the scene's unit, energies of its square."""

    num_lights: tuple[int, int] = (2, 5)
    # A side is drawn first, then a place on it. Blender's up is our -down; its two ranges mirror each other.
    right: tuple[Range, ...] = ((0.0, 3.0), (-2.0, 0.0))
    down: tuple[Range, ...] = ((0.0, 2.0), (-2.0, 0.0))
    # Official: 1 or 2, of depths from 1 to 100. Guessed and measured depth is flatter, with its middle at 1.3 to 1.6
    # units, most of which a light at 2 would shine on from behind; so there is a nearer place, too.
    forward: tuple[float, ...] = (0.5, 1.0, 2.0)
    # 400 to 2000 W over 500, and an ambient strength of 1.6 to 2.6 over 4: then the light that a photo receives is
    # about 1 on average, and nine in ten pictures come out 0.67 to 1.24 times as bright as they went in.
    energy: Range = (0.8, 4.0)
    ambient: Range = (0.4, 0.65)
    # Each channel of a light is the low end or, as often, anything in the range.
    color: Range = (0.5, 1.0)
    # The rest is not in the official script, which has neither a camera's response nor any setting of shadows.
    shadow_probability: float = 0.8
    radius: Range = (0.02, 0.2)  # from shadows that look sharp to soft ones
    min_distance: float = 0.7  # a lamp that touches a wall would bleach it
    exposure: Range = (0.7, 1.4)  # half a stop either way
    white_balance: Range = (0.85, 1.18)  # of each channel: lamp light or shade
    gamma: Range = (0.8, 1.25)

    def __post_init__(self) -> None:
        ranges = {"energy": self.energy, "ambient": self.ambient, "color": self.color, "radius": self.radius}
        positive = {"exposure": self.exposure, "white_balance": self.white_balance, "gamma": self.gamma}
        for name, (low, high) in (ranges | positive).items():
            if not 0 <= low <= high < math.inf or (name in positive and low == 0):
                raise L2MError(f"RelightCfg {name}", expected="0 <= low <= high", got=f"({low:g}, {high:g})")
        if not 0 <= self.num_lights[0] <= self.num_lights[1]:
            raise L2MError("RelightCfg num_lights", expected="0 <= low <= high", got=str(self.num_lights))


@dataclass(frozen=True)
class ShadeCfg:
    """How light is computed."""

    # Standard deviation of the Gaussian average of depth slopes, over the photo's short side. The official script
    # smooths a network's disparity by 2 of 512 px. Ours also has to carry guessed and 8-bit depth, and a normal is made
    # of differences: noise of 1 % in depth turns those of neighbouring pixels by more than 45 degrees.
    smoothing: float = 0.01
    max_depth_ratio: float = 1.05  # neighbours farther apart are not averaged, as in `MeshCfg`
    steps: int = 24  # of each march; with the stagger 384 places per shadow edge
    # Both of the depth: a surface this little in front of the ray is the one that it started from,
    bias: float = 0.01
    thickness: float = 0.25  # and one farther behind a surface than this passes behind it

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.thickness > self.bias >= 0 or not self.smoothing >= 0:
            expected = "steps >= 1, thickness > bias >= 0, smoothing >= 0"
            raise L2MError("ShadeCfg", expected=expected, got=str(self))


@dataclass(frozen=True)
class Lighting(Saved):
    """Point lights in world coordinates, ambient light, and the camera's response; lengths in units of the depth.

    Raises:
        ShapeError: the lights' fields differ in length.
        L2MError: a value is not finite, or negative where only light, length or a factor above 0 makes sense.
    """

    positions: Float[Tensor, "n 3"]
    colors: Float[Tensor, "n 3"]
    energies: Float[Tensor, " n"]  # light received at distance 1, facing the lamp
    ambient: Float[Tensor, " 3"]
    white_balance: Float[Tensor, " 3"]
    exposure: float = 1.0
    gamma: float = 1.0
    shadows: bool = True
    radius: float = 0.0  # of every lamp; only softens shadows
    min_distance: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.energies)
        shapes = [
            tuple(value.shape) for value in (self.positions, self.colors, self.ambient, self.white_balance)
        ]
        if self.energies.ndim != 1 or shapes != [(n, 3), (n, 3), (3,), (3,)]:
            expected = "positions and colors (n, 3), energies (n,), ambient and white_balance (3,)"
            raise ShapeError("Lighting", expected=expected, got=f"{shapes} for n = {n}")
        light = torch.cat([value.flatten() for value in (self.colors, self.energies, self.ambient)])
        lengths, factors = light.new_tensor([self.radius, self.min_distance]), self.white_balance
        factors = torch.cat([factors, factors.new_tensor([self.exposure, self.gamma])])
        every = torch.cat([self.positions.flatten(), light, lengths, factors])
        if not torch.isfinite(every).all() or min(light.min(), lengths.min()) < 0 or factors.min() <= 0:
            expected = "finite numbers, light and lengths >= 0, exposure, white_balance and gamma > 0"
            raise L2MError("Lighting", expected=expected, got=str(self))


def sample_lighting(
    unit: float, cfg: RelightCfg | None = None, generator: torch.Generator | None = None
) -> Lighting:
    """Draw a lighting for a scene whose `LiftedScene.unit` is ``unit``.

    Raises:
        L2MError: the unit is not finite and positive.
    """
    cfg = cfg or RelightCfg()
    if not 0 < unit < math.inf:
        raise L2MError("sample_lighting unit", expected="a finite length > 0", got=f"{unit:g}")
    n = int(torch.randint(cfg.num_lights[0], cfg.num_lights[1] + 1, (), generator=generator))
    axes = []
    for sides in (cfg.right, cfg.down):
        low, high = _choose(torch.tensor(sides), n, generator).unbind(-1)
        axes.append(low + (high - low) * _draw((0.0, 1.0), (n,), generator))
    axes.append(_choose(torch.tensor(cfg.forward), n, generator))
    colored = _draw((0.0, 1.0), (n, 3), generator) < 0.5
    exposure, gamma, *white_balance = (
        _draw((math.log(low), math.log(high)), (), generator).exp()
        for low, high in (cfg.exposure, cfg.gamma, *[cfg.white_balance] * 3)
    )
    return Lighting(
        positions=torch.stack(axes, dim=-1) * unit,  # [n 3]
        colors=torch.where(colored, _draw(cfg.color, (n, 3), generator), cfg.color[0]),
        energies=_draw(cfg.energy, (n,), generator) * unit**2,
        ambient=_draw(cfg.ambient, (), generator).expand(3).clone(),
        white_balance=torch.stack(white_balance),
        exposure=exposure.item(),
        gamma=gamma.item(),
        shadows=_draw((0.0, 1.0), (), generator).item() < cfg.shadow_probability,
        radius=_draw(cfg.radius, (), generator).item() * unit,
        min_distance=cfg.min_distance * unit,
    )


def _draw(span: Range, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return span[0] + (span[1] - span[0]) * torch.rand(shape, generator=generator)


def _choose(options: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    return options[torch.randint(len(options), (count,), generator=generator)]


def shade(
    image: Float[Tensor, "h w 3"],
    depth: Float[Tensor, "h w"],
    valid: Bool[Tensor, "h w"],
    camera: Camera,
    lighting: Lighting,
    cfg: ShadeCfg | None = None,
) -> Float[Tensor, "h w 3"]:
    """Relight one view of a scene; on the CPU, in numba.

    Args:
        image: What the camera sees, RGB in [0, 1].
        depth: z-depth of every pixel, of the photo or rendered.
        valid: Where depth is known.
        camera: The view's camera; its pose takes the lights from the world (the photo's camera) to this view.
        lighting: The lights.
        cfg: How light is computed.

    Raises:
        ShapeError: image, depth, mask and camera differ in size.
        ImageError: the image is not float with values in [0, 1].
        L2MError: depth is not finite and positive in a valid pixel.
    """
    cfg = cfg or ShadeCfg()
    _check_sizes("shade", 2, image, depth, valid, [camera], [lighting])
    require_image("shade", image)
    nearest, farthest = torch.where(valid, depth, 1.0).aminmax()
    if not 0 < nearest <= farthest < math.inf:
        todo = "mask what is unknown"
        raise L2MError("shade", expected="finite depth > 0 in valid pixels", got="others", todo=todo)
    half, whole = _gaussian(camera.hw, cfg)
    margin = len(whole)
    K = _array(camera.K)
    pinhole = (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
    lamps = (
        _array(_lights(camera, lighting)),
        np.float32(lighting.radius),
        np.float32(lighting.min_distance),
    )
    limits = np.float32(cfg.bias), np.float32(cfg.thickness), np.float32(NEAR)
    response = (_array(lighting.ambient), _array(_gain(lighting)))
    powers = np.float32(1 / DISPLAY_GAMMA), np.float32(lighting.gamma)
    far, out = np.empty(camera.hw, np.float32), np.empty((*camera.hw, 3), np.float32)
    planes = _relight.empty_planes(camera.hw, margin)
    run_kernel(_relight.invert_depth, _array(depth), np.ascontiguousarray(valid.numpy()), margin, far, planes)
    run_kernel(_relight.sum_rows, planes, margin, np.float32(cfg.max_depth_ratio), half, whole)
    run_kernel(
        _relight.light_rows, far, planes, margin, half, whole, pinhole, lamps, lighting.shadows, limits, _STAGGER,
        _growth(cfg),
    )  # fmt: skip
    if lighting.shadows:
        run_kernel(_relight.blur_rows, planes, margin, _UNSTAGGER)
    run_kernel(
        _relight.tone_rows, _array(image), planes, margin, lighting.shadows, _UNSTAGGER, response, powers, out
    )
    return torch.from_numpy(out)


def shade_batch(
    image: Float[Tensor, "b h w 3"],
    depth: Float[Tensor, "b h w"],
    valid: Bool[Tensor, "b h w"],
    cameras: Sequence[Camera],
    lightings: Sequence[Lighting],
    cfg: ShadeCfg | None = None,
) -> Float[Tensor, "b h w 3"]:
    """Do what `shade` does for several views at once, in plain torch, wherever the images are: its readable twin.

    The values of images and depths are not checked: a GPU would have to wait for the answer.

    Raises:
        ShapeError: the views differ in size, or the arguments in number.
    """
    cfg = cfg or ShadeCfg()
    _check_sizes("shade_batch", 3, image, depth, valid, cameras, lightings)
    surface = _surface(depth, valid, cameras, cfg)
    lamps = _lamps(cameras, lightings, depth)
    lit, seen = torch.zeros_like(image), torch.zeros_like(image)  # without and with shadows
    for position, power in zip(lamps.positions.unbind(1), lamps.powers.unbind(1), strict=True):
        to_light = position[:, None, None] - surface.points  # [b h w 3]
        square = (to_light * to_light).sum(dim=-1).clamp(min=_relight.TINY)
        facing = (surface.normals * to_light).sum(dim=-1).clamp(min=0) / square.sqrt()
        visible = torch.where(lamps.shadows, _visible(surface, position, to_light, lamps.radius, cfg), 1.0)
        received = torch.where(valid, facing / torch.maximum(square, lamps.min_distance**2), 0.0)
        lit += received[..., None] * power[:, None, None]
        seen += (received * visible)[..., None] * power[:, None, None]
    direct = lit * _unstaggered(lit, seen, surface.links)
    light = (lamps.ambient + direct) * lamps.gain
    return (image * light ** (1 / DISPLAY_GAMMA)).clamp(max=1) ** lamps.gamma


@dataclass(frozen=True)
class _Surface:
    """What the pixels of a batch of views look at."""

    grid: Float[Tensor, "h w 2"]  # px
    points: Float[Tensor, "b h w 3"]  # camera frame
    normals: Float[Tensor, "b h w 3"]
    inverse_depth: Float[Tensor, "b h w"]  # 1 where unknown
    far: Float[Tensor, "b h w"]  # depth, FAR where unknown
    bias: Float[Tensor, "b h w"]  # of the depth
    # 1 where a pixel and its right, and its lower, neighbour are one surface; [b h w] each
    links: tuple[Tensor, Tensor]
    pinhole: tuple[Tensor, Tensor, Tensor, Tensor]  # fx, fy, cx, cy [b 1 1] each


@dataclass(frozen=True)
class _Lamps:
    """The lightings of a batch, lights that a view lacks being dark, in the cameras' frames."""

    positions: Float[Tensor, "b n 3"]
    powers: Float[Tensor, "b n 3"]
    ambient: Float[Tensor, "b 1 1 3"]
    gain: Float[Tensor, "b 1 1 3"]
    gamma: Float[Tensor, "b 1 1 1"]
    shadows: Bool[Tensor, "b 1 1"]
    radius: Float[Tensor, "b 1 1"]
    min_distance: Float[Tensor, "b 1 1"]


def _lamps(cameras: Sequence[Camera], lightings: Sequence[Lighting], like: Tensor) -> _Lamps:
    most = max(len(lighting.energies) for lighting in lightings)
    lights = [_lights(camera, lighting) for camera, lighting in zip(cameras, lightings, strict=True)]
    lights = torch.stack([F.pad(one, (0, 0, 0, most - len(one))) for one in lights]).to(like)  # [b n 6]
    return _Lamps(
        positions=lights[..., :3],
        powers=lights[..., 3:],
        ambient=_column([lighting.ambient for lighting in lightings], like, 3),
        gain=_column([_gain(lighting) for lighting in lightings], like, 3),
        gamma=_column([lighting.gamma for lighting in lightings], like, 1),
        shadows=_column([float(lighting.shadows) for lighting in lightings], like) > 0,
        radius=_column([lighting.radius for lighting in lightings], like),
        min_distance=_column([lighting.min_distance for lighting in lightings], like),
    )


def _column(values: list[float] | list[Tensor], like: Tensor, *shape: int) -> Tensor:
    return torch.stack([torch.as_tensor(value) for value in values]).to(like).reshape(-1, 1, 1, *shape)


def _surface(depth: Tensor, valid: Tensor, cameras: Sequence[Camera], cfg: ShadeCfg) -> _Surface:
    height, width = depth.shape[1:]
    K = torch.stack([camera.K for camera in cameras]).to(depth)[:, None, None]  # [b 1 1 3 3]
    fx, fy, cx, cy = K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2]
    grid = pixel_grid((height, width), device=depth.device, dtype=depth.dtype)
    u, v = grid.unbind(-1)
    z = torch.where(valid, depth, 1.0)
    w = 1 / z
    known = torch.where(valid, w, 0.0)
    steps, links = [], []
    for dim in (-1, -2):
        neighbor = _shifted(known, 1, dim)
        low, high = torch.minimum(known, neighbor), torch.maximum(known, neighbor)
        link = ((low > 0) & (high <= cfg.max_depth_ratio * low)).to(w)
        links.append(link)
        steps.append(torch.stack([(neighbor - known) * link, link]))  # [2 b h w]
    half, whole = _gaussian((height, width), cfg)
    x = _connected_sum(_connected_sum(steps[0], links[0], half, -1, between=True), links[1], whole, -2)
    y = _connected_sum(_connected_sum(steps[1], links[0], whole, -1), links[1], half, -2, between=True)
    sx, sy = (total / weight.clamp(min=_relight.TINY_WEIGHT) for total, weight in (x, y))
    towards = -torch.stack([fx * sx, fy * sy, w - sx * (u - cx) - sy * (v - cy)], dim=-1)
    return _Surface(
        grid=grid,
        points=torch.stack([(u - cx) / fx * z, (v - cy) / fy * z, z], dim=-1),
        normals=towards / towards.norm(dim=-1, keepdim=True),
        inverse_depth=w,
        far=torch.where(valid, depth, _relight.FAR),
        bias=cfg.bias + 0.5 * (sx.abs() + sy.abs()) * z,  # the depth that is read is up to half a pixel off
        links=(links[0], links[1]),
        pinhole=(fx, fy, cx, cy),
    )


def _shifted(values: Tensor, offset: int, dim: int) -> Tensor:
    """Return values[i + offset] along an axis, 0 beyond its ends."""
    out, count = torch.zeros_like(values), values.shape[dim] - abs(offset)
    if count > 0:
        out.narrow(dim, max(0, -offset), count).copy_(values.narrow(dim, max(0, offset), count))
    return out


def _connected_sum(
    values: Tensor, link: Tensor, weights: np.ndarray, dim: int, *, between: bool = False
) -> Tensor:
    """Weighted sum over the neighbours along an axis that unbroken links lead to; link i joins pixels i and i + 1.

    Values sit on the pixels or ``between`` i and i + 1; ``weights`` are by distance, from 0 or from 1 / 2 on.
    """
    total = torch.zeros_like(values) if between else float(weights[0]) * values
    up = down = torch.ones_like(link)
    for k in range(1, len(weights) + between):
        up, down = up * _shifted(link, k - 1, dim), down * _shifted(link, -k, dim)
        far, near = (k - 1, -k) if between else (k, -k)
        both = up * _shifted(values, far, dim) + down * _shifted(values, near, dim)
        total = total + float(weights[k - between]) * both
    return total


def _unstaggered(
    lit: Float[Tensor, "b h w 3"], seen: Float[Tensor, "b h w 3"], links: tuple[Tensor, Tensor]
) -> Float[Tensor, "b h w 3"]:
    """Share of the light that arrives, averaged over a pattern of the stagger: exactly 0 or 1 where all of it is."""
    values = torch.stack([lit, seen]).movedim(-1, 1)  # [2 3 b h w]
    values = _connected_sum(_connected_sum(values, links[0], _UNSTAGGER, -1), links[1], _UNSTAGGER, -2)
    return (values[1] / values[0].clamp(min=_relight.TINY)).movedim(0, -1)


def _visible(
    surface: _Surface,
    light: Float[Tensor, "b 3"],
    to_light: Float[Tensor, "b h w 3"],
    radius: Tensor,
    cfg: ShadeCfg,
) -> Float[Tensor, "b h w"]:
    """Share of a light that reaches each pixel.

    On the screen the ray is a straight line, along which inverse depth is linear: both are stepped through together.
    """
    (u, v), w, z = surface.grid.unbind(-1), surface.inverse_depth, surface.points[..., 2]
    height, width = u.shape
    light_z, near = light[:, 2, None, None], NEAR * z
    # The part of the way that can be seen: the camera's plane ends it,
    part = torch.where(light_z < near, (near - z) / to_light[..., 2], 1.0)
    end = surface.points + part[..., None] * to_light
    fx, fy, cx, cy = surface.pinhole
    w_end = 1 / end[..., 2]
    du, dv, dw = fx * end[..., 0] * w_end + cx - u, fy * end[..., 1] * w_end + cy - v, w_end - w
    inside_u = torch.where(du > 0, width - _relight.EDGE - u, u - _relight.EDGE)
    inside_v = torch.where(dv > 0, height - _relight.EDGE - v, v - _relight.EDGE)
    length = torch.minimum(
        inside_u / du.abs().clamp(min=_relight.TINY), inside_v / dv.abs().clamp(min=_relight.TINY)
    ).clamp(max=1)  # and so does the picture's border
    # At a part t of the way the light's disc is seen as 2 radius t wide, in units of depth 2 radius (t w): linear too.
    sharpness = 0.5 / (radius * part * w_end * length).clamp(min=0.5 / _relight.SHARPEST)
    step = length / cfg.steps
    du, dv, dw = du * step, dv * step, dw * step
    stagger = torch.from_numpy(_STAGGER).to(w).repeat(-(-height // 4), -(-width // 4))[:height, :width]
    flat, dark = surface.far.flatten(1), torch.zeros_like(w)
    for k, growth in enumerate(_growth(cfg).tolist()):
        x, y = (u + (k + stagger) * du).long(), (v + (k + stagger) * dv).long()
        place = (y * width + x).clamp(0, height * width - 1)
        depth = flat.gather(1, place.flatten(1)).reshape(w.shape)
        clearance = depth * (w + (k + stagger) * dw) - 1  # of the surface behind the ray, of the ray's depth
        front = 0.5 - (clearance + surface.bias) * sharpness * growth
        # A ray must not skip the whole thickness between two samples: it is at least one step deep.
        back = (clearance + cfg.thickness + depth * dw.abs()) * (_relight.BACK_SLOPE / cfg.thickness)
        dark = torch.maximum(dark, torch.minimum(front, back))
    return 1 - dark.clamp(max=1)


def _gaussian(hw: HW, cfg: ShadeCfg) -> tuple[np.ndarray, np.ndarray]:
    """Weights at distances 0.5, 1.5, ... and 0, 1, ... px, to two standard deviations."""
    sigma = max(0.5, cfg.smoothing * min(hw))
    distance = np.arange(math.ceil(2 * sigma) + 1, dtype=np.float32)
    half, whole = (
        np.exp(-0.5 * (d / sigma) ** 2).astype(np.float32) for d in (distance[:-1] + 0.5, distance)
    )
    return half, whole


def _growth(cfg: ShadeCfg) -> np.ndarray:
    """One over the part of the way at each step: how much sharper the light's edge is there than at the end."""
    return (cfg.steps / (np.arange(cfg.steps) + 0.5)).astype(np.float32)


def _lights(camera: Camera, lighting: Lighting) -> Float[Tensor, "n 6"]:
    """Position in the camera's frame and power (r, g, b) of every light."""
    positions = transform_points(camera.w2c.to(lighting.positions), lighting.positions)
    return torch.cat([positions, lighting.colors * lighting.energies[:, None]], dim=-1)


def _gain(lighting: Lighting) -> Float[Tensor, " 3"]:
    return lighting.white_balance * lighting.exposure


def _check_sizes(
    name: str,
    axes: int,
    image: Tensor,
    depth: Tensor,
    valid: Tensor,
    cameras: Sequence[Camera],
    lightings: Sequence[Lighting],
) -> None:
    sizes = {tuple(depth.shape[-2:]), *(camera.hw for camera in cameras)}
    counts = {len(cameras), len(lightings), *depth.shape[:-2]}
    whole = (
        depth.ndim == axes
        and image.shape == (*depth.shape, 3)
        and depth.shape == valid.shape
        and depth.numel() > 0
    )
    if not whole or len(sizes) > 1 or len(counts) > 1:
        got = f"image {tuple(image.shape)}, depth {tuple(depth.shape)}, mask {tuple(valid.shape)}, "
        got += f"{len(lightings)} lightings, cameras of (H, W) {[camera.hw for camera in cameras]}"
        views = "(B, H, W)" if axes == 3 else "(H, W)"
        expected = f"depth and mask {views}, image {views[:-1]}, 3), one camera and one lighting each"
        raise ShapeError(name, expected=expected, got=got)


def _array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().numpy(), np.float32)
