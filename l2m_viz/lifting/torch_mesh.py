"""Many photos lifted and rendered at once in plain torch, wherever they are: `LiftedScene` for a batch on a GPU.

The rules are those of `l2m_viz.lifting.scene` and its numba kernels: one vertex a pixel, two triangles a quad, none
across a discontinuity; a triangle claims the pixels whose centre is inside it or on its outline; a back face hides and
shows nothing; attributes are interpolated perspective-correctly.

Triangle 2 q + s of a photo has the corners (a, b, c), s = 0, or (b, d, c), s = 1, of quad q = (W - 1) y + x. Every
triangle lists the pixels of its bounding box, its candidates; the lists of all triangles of all photos are one vector.
A candidate that the triangle covers sends one 64-bit number to its pixel, inverse depth above and triangle below, and
the pixel keeps the largest: the nearest surface, and of equals the first triangle, in whatever order they come.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from l2m_viz.data.images import require_image
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import HW, pixel_grid
from l2m_viz.lifting.scene import NEAR, MeshCfg

# As the numba kernels have it: rounding must open neither a shared edge nor the outline. px, and px^2 for the edges.
_TOL = 1e-3
# Triangles, pixels and candidates that are worked on at once. A candidate takes about 150 bytes on its way: 600 MB on a
# GPU, which is idle with less; on a CPU, what its cache holds.
_CHUNK = {"cpu": 2**15}
_CHUNK_ELSEWHERE = 2**22
_LAST = 2**31 - 1  # the lower half of a pixel's number counts triangles from the last to the first


@dataclass(frozen=True)
class LiftedBatch:
    """Photos of one size lifted to meshes; the fields are those of `LiftedScene`, along a leading axis."""

    image: Float[Tensor, "b h w 3"]
    depth: Float[Tensor, "b h w"]
    valid_mask: Bool[Tensor, "b h w"]
    Ks: Float[Tensor, "b 3 3"]
    triangle_mask: Bool[Tensor, "b quads_y quads_x 2"]
    cut_mask: Bool[Tensor, "b h w"]

    @property
    def hw(self) -> HW:
        """Size (H, W) of the photos in pixels."""
        return self.depth.shape[1], self.depth.shape[2]

    @cached_property
    def units(self) -> Float[Tensor, " b"]:
        """Each scene's own length, see `LiftedScene.unit`; infinite where no depth is valid."""
        pixels = self.depth[0].numel()
        smallest = torch.where(self.valid_mask, self.depth, torch.inf).flatten(1)
        # Of at most all pixels: the ranks of those that are valid come no later.
        smallest = smallest.topk(min(pixels, int(0.02 * pixels) + 2), largest=False, sorted=True).values
        place = 0.02 * (self.valid_mask.flatten(1).sum(dim=1, keepdim=True) - 1).clamp(min=0)  # [b 1]
        low, high = smallest.gather(1, place.floor().long()), smallest.gather(1, place.ceil().long())
        return torch.where(low == high, low, torch.lerp(low, high, place - place.floor()))[:, 0]

    def select(self, index: Int64[Tensor, " n"]) -> "LiftedBatch":
        """Some of the scenes."""
        fields = (
            self.image, self.depth, self.valid_mask, self.Ks, self.triangle_mask, self.cut_mask
        )  # fmt: skip
        return LiftedBatch(*(field[index] for field in fields))


@dataclass(frozen=True)
class ViewBatch:
    """What one camera each sees of lifted scenes; ``depth`` means something only outside ``hole_mask``."""

    image: Float[Tensor, "b h w 3"]
    depth: Float[Tensor, "b h w"]
    hole_mask: Bool[Tensor, "b h w"]


def lift_batch(
    images: Float[Tensor, "b h w 3"],
    depths: Float[Tensor, "b h w"],
    valid: Bool[Tensor, "b h w"],
    Ks: Float[Tensor, "b 3 3"],
    cfg: MeshCfg | None = None,
) -> LiftedBatch:
    """Do what `lift` does for several photos at once.

    Args:
        images: The photos, RGB in [0, 1]. On a GPU their values are not checked: it would have to wait.
        depths: Their z-depths, in any unit; positive where valid.
        valid: Where depth is known.
        Ks: Their intrinsics in pixels.
        cfg: How triangles are made.

    Raises:
        ShapeError: the arguments differ in number or size, or the photos are smaller than 2x2.
        ImageError: the images are not float with values in [0, 1].
    """
    shapes = [tuple(value.shape) for value in (images, depths, valid, Ks)]
    batch, hw = shapes[1][:1], shapes[1][1:]
    if shapes != [(*batch, *hw, 3), (*batch, *hw), (*batch, *hw), (*batch, 3, 3)] or len(hw) != 2:
        expected = "images (B, H, W, 3), depths and valid (B, H, W), Ks (B, 3, 3)"
        raise ShapeError("lift_batch", expected=expected, got=str(shapes))
    if min(*hw, *batch) < 1 or min(hw) < 2:
        raise ShapeError("lift_batch", expected="a photo or more, of at least 2x2 px", got=str(shapes[1]))
    if images.device.type == "cpu":
        require_image("lift_batch", images.flatten(0, 1))
    triangle_mask, cut_mask = _triangles(depths, valid, (cfg or MeshCfg()).max_depth_ratio)
    return LiftedBatch(images, depths, valid, Ks.to(depths), triangle_mask, cut_mask)


def _triangles(
    depth: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"], max_ratio: float
) -> tuple[Bool[Tensor, "b quads_y quads_x 2"], Bool[Tensor, "b h w"]]:
    """Which triangles exist, and which pixels are beside one that would span a discontinuity."""
    z, known = _of_triangles(depth), _of_triangles(valid)  # three corners [b quads_y quads_x 2] each
    exists = known[0] & known[1] & known[2]
    near, far = torch.minimum(torch.minimum(*z[:2]), z[2]), torch.maximum(torch.maximum(*z[:2]), z[2])
    one_surface = far <= near * max_ratio
    across, cut_mask = exists & ~one_surface, torch.zeros_like(valid)
    a, b, c, d = _quads(cut_mask)
    a |= across[..., 0]
    d |= across[..., 1]
    b |= across.any(dim=-1)
    c |= across.any(dim=-1)
    return exists & one_surface, cut_mask


def _quads(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the corners a b / c d of every quad of maps [b h w] have, as views [b quads_y quads_x]."""
    return values[:, :-1, :-1], values[:, :-1, 1:], values[:, 1:, :-1], values[:, 1:, 1:]


def _of_triangles(values: Tensor) -> list[Tensor]:
    """What the three corners of every triangle have, [b quads_y quads_x 2] each."""
    a, b, c, d = _quads(values)
    return [torch.stack(sides, dim=-1) for sides in ((a, b), (b, d), (c, c))]


def render_batch(
    scenes: LiftedBatch,
    w2cs: Float[Tensor, "b 4 4"],
    Ks: Float[Tensor, "b 3 3"] | None = None,
    hw: HW | None = None,
) -> ViewBatch:
    """Do what `LiftedScene.render` does for one camera each; arguments as for `render_attributes_batch`."""
    image, depth, covered = render_attributes_batch(scenes, scenes.image, w2cs, Ks, hw)
    return ViewBatch(image, depth, hole_mask=~covered)


@torch.no_grad()
def render_attributes_batch(
    scenes: LiftedBatch,
    attributes: Float[Tensor, "b h w c"],
    w2cs: Float[Tensor, "b 4 4"],
    Ks: Float[Tensor, "b 3 3"] | None = None,
    hw: HW | None = None,
) -> tuple[Float[Tensor, "b rows cols c"], Float[Tensor, "b rows cols"], Bool[Tensor, "b rows cols"]]:
    """Render any per-pixel attribute: return (attributes, depth, covered), zeros where nothing covers the pixel.

    No gradients: the nearest surface has none, and training takes renders as they are.

    Args:
        scenes: The lifted photos.
        attributes: What every pixel of every photo has.
        w2cs: One camera's pose for each.
        Ks: Their intrinsics in pixels; the photos' if None.
        hw: Size (H, W) of the renders; the photos' if None.

    Raises:
        ShapeError: not one camera for each scene, attributes of another size, or renders without pixels.
    """
    Ks, (rows, columns) = scenes.Ks if Ks is None else Ks.to(scenes.depth), hw or scenes.hw
    count = len(scenes.depth)
    got = [tuple(value.shape) for value in (attributes[..., 0], w2cs, Ks)]
    if got != [(count, *scenes.hw), (count, 4, 4), (count, 3, 3)] or min(rows, columns) < 1:
        expected = (
            f"attributes {(count, *scenes.hw)} + (C,), {count} w2cs, {count} Ks, a size of 1x1 px or more"
        )
        raise ShapeError("render_attributes_batch", expected=expected, got=f"{got}, {rows}x{columns} px")
    work = max(rows * columns, 2 * scenes.depth[0].numel())
    step = max(1, _chunk(scenes.depth.device) // work)
    parts = []
    for first in range(0, count, step):
        part = slice(first, first + step)
        screen = _project(scenes, w2cs.to(scenes.depth), Ks, part)
        keys = _nearest(screen, scenes.triangle_mask[part], (rows, columns))
        parts.append(_interpolate(screen, attributes[part], keys))
    out, depth, covered = (torch.cat(values) for values in zip(*parts, strict=True))
    return out, depth, covered


def _chunk(device: torch.device) -> int:
    return _CHUNK.get(device.type, _CHUNK_ELSEWHERE)


def _project(scenes: LiftedBatch, w2cs: Tensor, Ks: Tensor, part: slice) -> Float[Tensor, "b h w 3"]:
    """Every vertex on the screen: x px, y px and 1/z, which is 0 where it cannot be used.

    Written out, for a matrix product may round to ten bits: TensorFloat-32 and autocast belong to a training.
    """
    depth, valid, K = scenes.depth[part], scenes.valid_mask[part], scenes.Ks[part]
    z = torch.where(valid, depth, 1.0)
    u, v = pixel_grid(scenes.hw, device=z.device, dtype=z.dtype).unbind(-1)
    x, y = ((p - c) / f * z for p, (f, c) in zip((u, v), _pinhole(K), strict=True))
    rows = w2cs[part, :3, :, None, None].unbind(1)  # three of [b 4 1 1]
    x, y, z = (row[:, 0] * x + row[:, 1] * y + row[:, 2] * z + row[:, 3] for row in rows)
    usable = valid & (z > NEAR * scenes.units[part, None, None])
    inverse = torch.where(usable, 1 / torch.where(usable, z, 1.0), 0.0)
    (fx, cx), (fy, cy) = _pinhole(Ks[part])
    return torch.stack([fx * (x * inverse) + cx, fy * (y * inverse) + cy, inverse], dim=-1)


def _pinhole(K: Float[Tensor, "b 3 3"]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(fx, cx) and (fy, cy), [b 1 1] each."""
    K = K[..., None, None]
    return (K[:, 0, 0], K[:, 0, 2]), (K[:, 1, 1], K[:, 1, 2])


@dataclass(frozen=True)
class _Triangles:
    """Triangles that may cover a pixel's centre, of all photos, one after the other."""

    corners: Float[Tensor, "3 3 n"]  # x px, y px and 1/z of each of three
    order: Int64[Tensor, " n"]  # the lower half of the number it sends
    first_pixel: Int64[Tensor, " n"]  # of its photo, in the vector of all pixels
    left: Int32[Tensor, " n"]
    top: Int32[Tensor, " n"]
    num_single: int  # these come first: the box of nearly all triangles holds one pixel
    wide: Int32[Tensor, " many"]  # pixels across the boxes of the others
    ends: Int64[Tensor, " many"]  # where their candidates end in the vector of all


def _nearest(
    screen: Float[Tensor, "b h w 3"], keep: Bool[Tensor, "b quads_y quads_x 2"], hw: HW
) -> Int64[Tensor, "b rows cols"]:
    """For every pixel what `_key` says of the nearest triangle, 0 where there is none."""
    rows, columns = hw
    keys = torch.zeros(len(screen) * rows * columns, dtype=torch.int64, device=screen.device)
    triangles = _listed(screen, keep, hw)
    for owner, x, y in _candidates(triangles, _chunk(screen.device)):
        corners = triangles.corners[..., owner]  # [3 3 m]
        area = _area(corners)
        edges = _edges(corners, x, y) * torch.where(area > 0, 1.0, -1.0)  # a back face hides, too
        hit = (edges.amin(dim=0) >= -_TOL) & (area != 0)
        edges = edges.clamp(min=0)  # no extrapolation: slivers would fling depth
        inverse = (edges * corners[2]).sum(dim=0) / edges.sum(dim=0)
        key = torch.where(hit, _key(inverse, triangles.order[owner]), 0)
        keys.scatter_reduce_(0, triangles.first_pixel[owner] + (y * columns + x), key, "amax")
    return keys.view(len(screen), rows, columns)


def _listed(
    screen: Float[Tensor, "b h w 3"], keep: Bool[Tensor, "b quads_y quads_x 2"], hw: HW
) -> _Triangles:
    """The triangles that are in front of the camera and whose bounding box holds a pixel's centre."""
    x, y, inverse = (_of_triangles(plane) for plane in screen.unbind(-1))
    # A pixel's centre is at +0.5: the columns and rows whose centre is in [min, max].
    (left, right), (top, bottom) = (
        (
            (torch.minimum(torch.minimum(p, q), r) - (0.5 + _TOL)).ceil().clamp(0, side),
            (torch.maximum(torch.maximum(p, q), r) - (0.5 - _TOL)).floor().clamp(-1, side - 1),
        )
        for (p, q, r), side in ((x, hw[1]), (y, hw[0]))
    )
    wide, high = right - left + 1, bottom - top + 1
    used = keep & (torch.minimum(torch.minimum(*inverse[:2]), inverse[2]) > 0) & (wide > 0) & (high > 0)
    one = (wide == 1) & (high == 1)
    single, many = ((used & some).flatten().nonzero()[:, 0] for some in (one, ~one))
    chosen = torch.cat([single, many])
    photo, number = chosen // keep[0].numel(), chosen % keep[0].numel()
    height, width = screen.shape[1:3]
    vertices = _corner_numbers(number, width) + photo * (height * width)
    wide = wide.flatten()[many]
    return _Triangles(
        corners=torch.stack([plane.flatten()[vertices] for plane in screen.unbind(-1)]),
        order=_LAST - number,
        first_pixel=photo * (hw[0] * hw[1]),
        left=left.flatten()[chosen].int(),
        top=top.flatten()[chosen].int(),
        num_single=len(single),
        wide=wide.int(),
        ends=(wide.long() * high.flatten()[many].long()).cumsum(0),
    )


def _corner_numbers(number: Int64[Tensor, " n"], width: int) -> Int64[Tensor, "3 n"]:
    """The three vertices of a photo's triangle, counted along its rows."""
    quad, side = number >> 1, number & 1
    a = quad + quad // (width - 1)  # a row has one vertex more than quads
    return torch.stack([a + side, a + 1 + side * width, a + width])


def _candidates(triangles: _Triangles, chunk: int) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Chunks of the vector of all candidates: which triangles, columns and rows."""
    for first in range(0, triangles.num_single, chunk):
        part = slice(first, min(triangles.num_single, first + chunk))
        yield part, triangles.left[part], triangles.top[part]
    total = int(triangles.ends[-1]) if len(triangles.ends) else 0
    for first in range(0, total, chunk):
        place = torch.arange(first, min(total, first + chunk), device=triangles.ends.device)
        many = torch.searchsorted(triangles.ends, place, right=True)
        owner = triangles.num_single + many
        # Counted from the end of each list, for its beginning is another's end: boxes are walked through backwards.
        place, wide = (triangles.ends[many] - 1 - place).int(), triangles.wide[many]
        row = place // wide
        yield owner, triangles.left[owner] + (place - row * wide), triangles.top[owner] + row


def _edges(corners: Float[Tensor, "3 3 m"], x: Tensor, y: Tensor) -> Float[Tensor, "3 m"]:
    """Twice the signed area between the centre of pixel (x, y) and each edge, that opposite corner 0, 1 and 2.

    Seen from the pixel, so that an edge has the very same value, but for the sign, for both triangles that share it.
    """
    (ax, bx, cx), (ay, by, cy) = corners[0] - (x + 0.5), corners[1] - (y + 0.5)
    return torch.stack([bx * cy - by * cx, cx * ay - cy * ax, ax * by - ay * bx])


def _area(corners: Float[Tensor, "3 3 m"]) -> Float[Tensor, " m"]:
    """Twice the signed area, positive where the photo's side is seen."""
    (ax, bx, cx), (ay, by, cy) = corners[0], corners[1]
    return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)


def _key(inverse_depth: Float[Tensor, " m"], order: Int64[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """One number that is larger for what is nearer: positive floats are in the order of their bits."""
    return (inverse_depth.view(torch.int32).long() << 32) | order


def _interpolate(
    screen: Float[Tensor, "b h w 3"], attributes: Float[Tensor, "b h w c"], keys: Int64[Tensor, "b rows cols"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Attributes of the visible front faces, perspective-correct, with depth and where there are any."""
    count, height, width = screen.shape[:3]
    drawn = keys > 0
    number = torch.where(drawn, _LAST - (keys & 0xFFFFFFFF), 0)
    photo = torch.arange(count, device=keys.device)[:, None, None] * (height * width)
    vertices = _corner_numbers(number.flatten(), width) + photo.expand_as(keys).flatten()
    corners = torch.stack([plane.flatten()[vertices] for plane in screen.unbind(-1)])  # [3 3 b*rows*cols]
    grid = torch.arange(keys[0].numel(), dtype=torch.int32, device=keys.device).repeat(count)
    weights = _edges(corners, grid % keys.shape[2], grid // keys.shape[2]).clamp(min=0) * corners[2]
    covered = drawn & (_area(corners) > 0).view_as(drawn)
    weights = torch.where(covered.flatten(), weights / weights.sum(dim=0), 0.0)[
        ..., None
    ]  # [3 b*rows*cols 1]
    a, b, c = attributes.flatten(0, 2)[vertices]
    out = weights[0] * a + weights[1] * b + weights[2] * c
    depth = torch.where(covered, 1 / (keys >> 32).int().view(torch.float32), 0.0)
    return out.view(*keys.shape, -1), depth, covered
