"""The random depth of `l2m_viz.lifting.random_planes` for a batch of photos in plain torch, wherever they are.

Everything is as there but the segments. A watershed floods pixel by pixel from a queue, which no GPU can do; taking it
from the CPU would bring every photo there and back. Here a pixel belongs to the seed that is nearest on a way along
which a step of a pixel costs 1 and what colours change costs more: segments are connected and end at the photo's edges,
too. The ways are found by sweeps along whole rows and columns. With C(i) the cost from the row's first pixel to pixel
i, the distance that comes from the left is

    d(i) = min_{j <= i} d(j) + C(i) - C(j) = C(i) + cummin(d - C)(i)

and the place of that minimum tells the seed. Each round of four sweeps adds a bend to the ways.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from l2m_viz.errors import ShapeError
from l2m_viz.geometry import HW, normalized_grid
from l2m_viz.lifting.random_planes import RandomPlanesCfg

_COLOR_COST = (
    100.0  # px for a step from black to white in one channel: a photo's edge costs as much as going round
)
_ROUNDS = 6
_FAR = 1e5  # px, farther than any way


def random_planes_disparity_batch(
    images: Float[Tensor, "b h w 3"],
    generators: Sequence[torch.Generator],
    cfg: RandomPlanesCfg | None = None,
) -> Float[Tensor, "b h w"]:
    """Draw a disparity in (0, 1] for each photo.

    The photo and its generator's state decide, not the batch. Each generator loses as much as
    `random_planes_disparity` takes from it, and its draws have the same ranges; their result is another.

    Args:
        images: RGB in [0, 1].
        generators: One on the CPU for each photo.
        cfg: Ranges of the random geometry.

    Raises:
        ShapeError: not one generator for each photo.
    """
    cfg = cfg or RandomPlanesCfg()
    if len(generators) != len(images):
        got = f"{len(generators)} for {len(images)} photos"
        raise ShapeError("random_planes_disparity_batch generators", expected="one a photo", got=got)
    hw: HW = (images.shape[1], images.shape[2])
    scale = min(1.0, cfg.working_side / max(hw))
    small_hw = max(2, round(hw[0] * scale)), max(2, round(hw[1] * scale))
    draws = [_draw(generator, small_hw, cfg) for generator in generators]
    drawn = {
        name: torch.from_numpy(np.stack([draw[name] for draw in draws])).to(images.device)
        for name in draws[0]
    }
    labels = _enlarged(_segments(_smaller(images, small_hw), drawn["places"]), hw)  # [b h w]
    smooth = _smooth(drawn["hills"], drawn["ground"], hw)
    x, y = (normalized_grid(hw, device=images.device) / 2).unbind(-1)  # from -1/2 to 1/2 over the photo
    a, b, c = (
        values.gather(1, labels.flatten(1)).view_as(smooth) for values in drawn["planes"].unbind(1)
    )  # never above the surface if the segment stays on it
    disparity = torch.maximum(a + b * x + c * y + 0.3 * smooth, smooth)
    farthest = drawn["farthest"][:, None, None]
    return farthest + (1 - farthest) * _stretched(disparity)


def _draw(generator: torch.Generator, hw: HW, cfg: RandomPlanesCfg) -> dict[str, np.ndarray]:
    """All random numbers of one photo; of as many segments as there may be, so that photos can be stacked."""
    rng = np.random.default_rng(int(torch.randint(0, 2**62, (), generator=generator)))
    most = cfg.num_segments[1]
    num = min(int(rng.integers(*cfg.num_segments, endpoint=True)), hw[0] * hw[1])
    seeds = rng.choice(hw[0] * hw[1], num, replace=False)
    hills = rng.random((4, 4)) * rng.uniform(0.1, 0.8)
    ground = rng.uniform(-0.3, 1.5)
    lifted = rng.random(most) < rng.uniform(*cfg.lifted_share)
    heights = np.where(
        lifted, rng.random(most), -10
    )  # disparities of planes and surface are between -1 and 2
    slopes = rng.uniform(-cfg.tilt, cfg.tilt, (2, most))
    drawn = {
        "hills": hills,
        "ground": ground,
        "planes": np.stack([heights, *slopes]),
        "farthest": rng.uniform(*cfg.farthest),
    }
    places = np.pad(seeds, (0, most - num), mode="edge").astype(np.int64)
    return {"places": places} | {name: np.asarray(value, np.float32) for name, value in drawn.items()}


def _smaller(images: Float[Tensor, "b h w 3"], hw: HW) -> Float[Tensor, "b 3 h2 w2"]:
    """The photos at the size at which they are segmented, a little blurred."""
    small = F.interpolate(images.movedim(-1, 1), hw, mode="bilinear", align_corners=False, antialias=True)
    return F.avg_pool2d(small, 3, stride=1, padding=1, count_include_pad=False)


def _segments(photos: Float[Tensor, "b 3 h w"], places: Int64[Tensor, "b k"]) -> Int64[Tensor, "b h w"]:
    """Number of the seed that each pixel belongs to; a place may be given twice, then its first number counts."""
    shape = photos[:, 0].shape
    labels = torch.zeros(shape, dtype=torch.int64, device=photos.device).flatten(1)
    distance = torch.full_like(labels, _FAR, dtype=photos.dtype).scatter_(1, places, 0.0)
    numbers = torch.arange(places.shape[1], device=photos.device).expand_as(places)
    last = torch.full_like(labels, places.shape[1]).scatter_reduce_(1, places, numbers, "amin")
    labels = torch.where(distance == 0, last, labels).view(shape)
    distance = distance.view(shape)
    costs = {dim: _ways(photos, dim) for dim in (-1, -2)}
    for _ in range(_ROUNDS):
        for dim, cost in costs.items():
            distance, labels = _sweep(distance, labels, cost, dim)
            back = (
                distance.flip(dim),
                labels.flip(dim),
                -cost.flip(dim),
            )  # costs only ever count as differences
            distance, labels = (values.flip(dim) for values in _sweep(*back, dim))
    return labels


def _ways(photos: Float[Tensor, "b 3 h w"], dim: int) -> Float[Tensor, "b h w"]:
    """Cost of going along an axis from the first pixel to each."""
    # In sixteenths: sums of them are exact in float32, so the segments are the same on every device.
    steps = 1 + (16 * _COLOR_COST * photos.diff(dim=dim).abs().sum(dim=1)).round() / 16
    return F.pad(steps.cumsum(dim), (1, 0) if dim == -1 else (0, 0, 1, 0))


def _sweep(
    distance: Float[Tensor, "b h w"], labels: Int64[Tensor, "b h w"], cost: Float[Tensor, "b h w"], dim: int
) -> tuple[Float[Tensor, "b h w"], Int64[Tensor, "b h w"]]:
    """What is nearer by coming along an axis, from its beginning."""
    nearest, source = (distance - cost).cummin(dim)
    return nearest + cost, labels.gather(dim, source)


def _enlarged(labels: Int64[Tensor, "b h w"], hw: HW) -> Int64[Tensor, "b h2 w2"]:
    """The nearest pixel at another size."""
    rows, columns = (
        ((torch.arange(to, device=labels.device) + 0.5) * side / to).long()
        for side, to in zip(labels.shape[1:], hw, strict=True)
    )
    return labels[:, rows][:, :, columns]


def _smooth(hills: Float[Tensor, "b 4 4"], ground: Float[Tensor, " b"], hw: HW) -> Float[Tensor, "b h w"]:
    """A few soft hills, and most often a ground that comes nearer downwards; 0 to 1."""
    surface = F.interpolate(hills[:, None], hw, mode="bicubic", align_corners=False)[:, 0]
    down = torch.linspace(0, 1, hw[0], device=hills.device)
    return _stretched(surface + ground[:, None, None] * down[:, None])


def _stretched(values: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """From 0 to 1, each map on its own."""
    low, high = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-6)
