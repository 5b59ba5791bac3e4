"""Training pairs from single photos: lift, look from elsewhere, and know where every pixel went.

The first view is the photo itself, the second a render of its mesh; correspondence comes from the two depth maps, both
ways. Light changes colours only, and filled holes stay holes: neither touches the correspondence. A pair is made from a
seed, so any pair can be made again from its photo.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from l2m_viz.data.files import Saved
from l2m_viz.data.images import read_image, require_image, resize_image
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.geometry import HW, invert_pose
from l2m_viz.lifting import (
    FILL_METHODS,
    LiftedScene,
    RelightCfg,
    View,
    ViewSamplerCfg,
    fill_holes,
    sample_cameras,
    sample_intrinsics,
    sample_lighting,
    shade,
    warp_from_depth,
)
from l2m_viz.lifting.synthesis import NothingButSkyError, lift_photo

Range = tuple[float, float]


@dataclass(frozen=True)
class PairCfg:
    """How a photo becomes a pair."""

    # Size (H, W) of both views in pixels.
    hw: HW = (256, 256)
    # Depth estimator, see `estimate_depth`.
    depth: str = "random-planes"
    # Camera ranges at difficulty 1: the paper's.
    views: ViewSamplerCfg = field(default_factory=ViewSamplerCfg)
    # The curriculum's position: 0 hardly moves the camera, 1 is the paper's range, more is extreme.
    difficulty: float = 1.0
    # Share of the pairs whose second camera rolls, where `views.roll_deg` has a range.
    p_roll: float = 1.0
    # Share of the pairs whose second camera walks round the scene, where `views.orbit_deg` has a range.
    p_orbit: float = 1.0
    # Side of the crop over the largest crop of the right shape.
    crop: Range = (0.6, 1.0)
    # Share of the pairs whose first view is a window of the lifted photo, so that the second also sees what lies beside
    # it, as a second photo of a place does; and the lifted part's side over the window's.
    p_surround: float = 0.0
    surround: Range = (1.2, 1.8)
    # How the sky is found and left out, see `sky_mask`; None leaves it in.
    sky: str | None = None
    # How holes are filled, see `fill_holes`; "background" needs another photo.
    holes: str = "none"
    # Share of the pairs whose holes are filled; those of the others stay black.
    p_fill: float = 1.0
    # Share of the pairs that get another light, and of these the share whose two views get different ones.
    p_relight: float = 0.0
    p_relight_apart: float = 0.5
    # Ranges of that light.
    relight: RelightCfg = field(default_factory=RelightCfg)
    # Covisible share that both views must have; after each miss the camera moves less.
    min_overlap: float = 0.15
    # Agreement of depths at which two points are one.
    rel_depth_tol: float = 0.05

    def __post_init__(self) -> None:
        if min(self.hw) < 2:
            raise ShapeError("PairCfg hw", expected="at least 2x2 px", got=str(self.hw))
        if not 0 <= self.difficulty < math.inf:
            raise L2MError("PairCfg difficulty", expected="a number >= 0", got=f"{self.difficulty:g}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise L2MError("PairCfg crop", expected="0 < low <= high <= 1", got=str(self.crop))
        if not 1 <= self.surround[0] <= self.surround[1] <= 4:
            got = str(self.surround)
            raise L2MError("PairCfg surround", expected="1 <= low <= high <= 4", got=got)
        if self.holes not in FILL_METHODS:
            expected = "one of " + ", ".join(f'"{name}"' for name in FILL_METHODS)
            raise L2MError("PairCfg holes", expected=expected, got=repr(self.holes))
        for name in ("p_roll", "p_orbit", "p_surround", "p_fill", "p_relight", "p_relight_apart"):
            if not 0 <= getattr(self, name) <= 1:
                got = f"{getattr(self, name):g}"
                raise L2MError(f"PairCfg {name}", expected="a probability, 0 to 1", got=got)


@dataclass(frozen=True)
class Pair(Saved):
    """Two views of one photo and the exact correspondence between them.

    Depth means something where valid. A covisible pixel is valid, lands inside the other image, on neither a hole nor
    an inpainted pixel, and not beside a cut in the mesh.

    Attributes:
        image_A: The photo (a crop of it).
        image_B: The render, holes filled.
        depth_A: z in A's camera.
        depth_B: z in B's camera.
        valid_A: True where depth_A is known.
        valid_B: True where depth_B is: outside the holes.
        hole_mask_B: True where the photo says nothing about B.
        inpainted_mask_B: True where B's colour was invented.
        warp_A_to_B: Where each pixel of A is in B, normalised.
        covisibility_A_to_B: True where B sees it, too.
        warp_B_to_A: The way back.
        covisibility_B_to_A: True where A sees it, too.
        K_A: Intrinsics in pixels.
        K_B: Intrinsics in pixels.
        T_A_to_B: Maps points of A's camera to B's.
        seed: Makes the same pair again from the same photo and settings.
    """

    image_A: Float[Tensor, "h w 3"]
    image_B: Float[Tensor, "h w 3"]
    depth_A: Float[Tensor, "h w"]
    depth_B: Float[Tensor, "h w"]
    valid_A: Bool[Tensor, "h w"]
    valid_B: Bool[Tensor, "h w"]
    hole_mask_B: Bool[Tensor, "h w"]
    inpainted_mask_B: Bool[Tensor, "h w"]
    warp_A_to_B: Float[Tensor, "h w 2"]
    covisibility_A_to_B: Bool[Tensor, "h w"]
    warp_B_to_A: Float[Tensor, "h w 2"]
    covisibility_B_to_A: Bool[Tensor, "h w"]
    K_A: Float[Tensor, "3 3"]
    K_B: Float[Tensor, "3 3"]
    T_A_to_B: Float[Tensor, "4 4"]
    seed: int

    @property
    def overlap(self) -> float:
        """The smaller one of the two covisible shares."""
        masks = self.covisibility_A_to_B, self.covisibility_B_to_A
        return min(mask.count_nonzero().item() / mask.numel() for mask in masks)


class NoPairError(L2MError):
    """These settings allow no pair from this photo."""


def read_photo(path: str | Path, cfg: PairCfg | None = None) -> Float[Tensor, "h w 3"]:
    """Read a photo for pairs; a JPEG much larger than they need is decoded at 1/2, 1/4 or 1/8 of its size.

    Every crop that `make_pair` may take still has at least the pixels of the pair.

    Raises:
        ImageError: no such file, or not a readable picture.
    """
    cfg, path = cfg or PairCfg(), Path(path)
    lifted = max(cfg.hw) * (cfg.surround[1] if cfg.p_surround > 0 else 1)
    side = math.ceil(lifted / cfg.crop[0])  # of both sides: EXIF may turn the picture
    try:
        if path.is_file():
            with JpegImageFile(path) as picture:
                picture.draft(None, (side, side))
                return read_image(picture)
    except Exception:  # another format or damaged: below is who can tell, and says it in the user's words
        return read_image(path)
    return read_image(path)


def make_pair(
    image: Float[Tensor, "h w 3"],
    cfg: PairCfg | None = None,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    background: Float[Tensor, "h2 w2 3"] | None = None,
) -> Pair:
    """Make a pair from one photo.

    Args:
        image: RGB in [0, 1], any size.
        cfg: Settings.
        generator: Draws the pair's seed.
        seed: The seed itself, to make a pair again; then ``generator`` is not used.
        background: The other photo behind the holes, for ``holes="background"``.

    Raises:
        ImageError: the photo is not float with values in [0, 1].
        L2MError: a background is missing, or given where none is needed.
        NoPairError: an overlap that cannot be reached even at rest, or nothing but sky.
    """
    cfg = cfg or PairCfg()
    require_image("make_pair", image)
    if (background is None) == (cfg.holes == "background"):
        expected, got = ("another photo", "none") if background is None else ("none", "a photo")
        raise L2MError(f'make_pair holes="{cfg.holes}": background', expected=expected, got=got)
    if seed is None:
        seed = int(torch.randint(0, 2**62, (), generator=generator))
    draw = torch.Generator().manual_seed(seed)
    whole, scene = _lifted(image, cfg, draw)
    pair, view = _overlapping(whole, scene, cfg, seed, draw)
    image_A, view = _relit(scene, view, cfg, draw)
    filled = _happens(cfg.p_fill, draw)
    view = fill_holes(view, cfg.holes, background=background, generator=draw) if filled else view
    return replace(pair, image_A=image_A, image_B=view.image, inpainted_mask_B=view.inpainted_mask)


def scaled(cfg: ViewSamplerCfg, difficulty: float) -> ViewSamplerCfg:
    """The sampler's ranges at a place of the curriculum: lengths and angles grow with it from nothing.

    Below 1 the ranges open towards zero as well, so that easy pairs are of all kinds, not of one small size.
    """

    def grown(span: Range) -> Range:
        return span[0] * difficulty * min(1.0, difficulty), span[1] * difficulty

    return replace(
        cfg,
        shift=grown(cfg.shift),
        dolly=grown(cfg.dolly),
        rotation_deg=grown(cfg.rotation_deg),
        # a roll hides little and has an end at half a turn: it grows to the full range and no further
        roll_deg=(cfg.roll_deg[0] * min(1.0, difficulty), cfg.roll_deg[1] * min(1.0, difficulty)),
        orbit_deg=grown(cfg.orbit_deg),
    )


def draw_views(cfg: PairCfg, draw: torch.Generator) -> ViewSamplerCfg:
    """The sampler's ranges for one pair: with a roll or an orbit, or without."""
    views = cfg.views
    if not _happens(cfg.p_roll, draw):
        views = replace(views, roll_deg=(0.0, 0.0))
    if views.orbit_deg[1] > 0 and not _happens(cfg.p_orbit, draw):
        views = replace(views, orbit_deg=(0.0, 0.0))
    return views


_MAX_TRIES = 12  # 0.7^11 is 2 % of the difficulty: nearly at rest


def _happens(probability: float, draw: torch.Generator) -> bool:
    return torch.rand((), generator=draw).item() < probability


def _lifted(image: Tensor, cfg: PairCfg, draw: torch.Generator) -> tuple[LiftedScene, LiftedScene]:
    """Lift a part of the photo; return it, and the window of it that is the first view (often all of it)."""
    hw, top, left = _surrounding(cfg, draw)
    photo = _random_crop(image, replace(cfg, hw=hw), draw)
    K = sample_intrinsics(cfg.hw, cfg.views, draw)  # of the window, whose middle is the principal point
    K[:2, 2] += torch.tensor([left, top], dtype=K.dtype)
    try:
        whole = lift_photo(photo, K, cfg.depth, cfg.sky, draw)
    except NothingButSkyError as error:
        raise NoPairError(f"make_pair: {error}") from error
    scene = whole.crop(top, left, cfg.hw) if hw != cfg.hw else whole
    if not scene.valid_mask.any():
        raise NoPairError("make_pair", expected="a first view with a pixel that is not sky", got="none")
    return whole, scene


def _surrounding(cfg: PairCfg, draw: torch.Generator) -> tuple[HW, int, int]:
    """Size of what is lifted, and where the first view is in it, all in pixels of that view."""
    if cfg.p_surround == 0 or not _happens(cfg.p_surround, draw):
        return cfg.hw, 0, 0
    share, x, y = torch.rand(3, generator=draw).tolist()
    factor = cfg.surround[0] + (cfg.surround[1] - cfg.surround[0]) * share
    height, width = (round(side * factor) for side in cfg.hw)
    return (height, width), round(y * (height - cfg.hw[0])), round(x * (width - cfg.hw[1]))


def _overlapping(
    whole: LiftedScene, scene: LiftedScene, cfg: PairCfg, seed: int, draw: torch.Generator
) -> tuple[Pair, View]:
    """Draw cameras until one sees enough of what the first view shows."""
    views, difficulty, overlap = draw_views(cfg, draw), cfg.difficulty, 0.0
    for _ in range(_MAX_TRIES):
        (camera,) = sample_cameras(scene, 1, scaled(views, difficulty), draw)
        view = whole.render(camera)
        pair = _with_truth(scene, view, cfg, seed)
        overlap = pair.overlap
        if overlap >= cfg.min_overlap:
            return pair, view
        difficulty *= 0.7
    got = f"{overlap:.2f} after {_MAX_TRIES} tries"
    todo = "lower min_overlap; the depth may be mostly unknown or cut"
    raise NoPairError("make_pair overlap", expected=f"at least {cfg.min_overlap:g}", got=got, todo=todo)


def _relit(
    scene: LiftedScene, view: View, cfg: PairCfg, draw: torch.Generator
) -> tuple[Float[Tensor, "h w 3"], View]:
    """Both images in another light, if this pair gets one: the same, or each its own."""
    if not _happens(cfg.p_relight, draw):
        return scene.image, view
    lighting_A = sample_lighting(scene.unit, cfg.relight, draw)
    apart = _happens(cfg.p_relight_apart, draw)
    lighting_B = sample_lighting(scene.unit, cfg.relight, draw) if apart else lighting_A
    image_A = shade(scene.image, scene.depth, scene.valid_mask, scene.camera, lighting_A)
    image_B = shade(view.image, view.depth, ~view.hole_mask, view.camera, lighting_B)
    return image_A, replace(view, image=image_B)


def _random_crop(image: Tensor, cfg: PairCfg, draw: torch.Generator) -> Tensor:
    """A random part of the pair's shape, at the pair's size."""
    height, width = image.shape[:2]
    largest = min(height / cfg.hw[0], width / cfg.hw[1])
    share = cfg.crop[0] + (cfg.crop[1] - cfg.crop[0]) * torch.rand((), generator=draw).item()
    crop = tuple(
        max(1, min(full, round(side * largest * share)))
        for side, full in zip(cfg.hw, (height, width), strict=True)
    )
    top, left = (
        int(torch.randint(0, full - part + 1, (), generator=draw))
        for full, part in zip((height, width), crop, strict=True)
    )
    return resize_image(image[top : top + crop[0], left : left + crop[1]], cfg.hw)


def _with_truth(scene: LiftedScene, view: View, cfg: PairCfg, seed: int) -> Pair:
    """Everything but the filling: correspondence both ways, never across a cut edge."""
    K_A, K_B, T_A_to_B = scene.K, view.camera.K, view.camera.w2c
    covered = ~view.hole_mask
    solid_A = scene.valid_mask & ~scene.cut_mask
    tol = cfg.rel_depth_tol
    warp_A_to_B, seen_A = warp_from_depth(
        scene.depth, K_A, view.depth, K_B, T_A_to_B, scene.valid_mask, covered, tol
    )
    T_B_to_A = invert_pose(T_A_to_B)
    warp_B_to_A, seen_B = warp_from_depth(view.depth, K_B, scene.depth, K_A, T_B_to_A, covered, solid_A, tol)
    return Pair(
        image_A=scene.image,
        image_B=view.image,
        depth_A=scene.depth,
        depth_B=view.depth,
        valid_A=scene.valid_mask,
        valid_B=covered,
        hole_mask_B=view.hole_mask,
        inpainted_mask_B=view.inpainted_mask,
        warp_A_to_B=warp_A_to_B,
        covisibility_A_to_B=seen_A & solid_A,
        warp_B_to_A=warp_B_to_A,
        covisibility_B_to_A=seen_B,
        K_A=K_A,
        K_B=K_B,
        T_A_to_B=T_A_to_B,
        seed=seed,
    )
