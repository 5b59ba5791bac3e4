"""Training pairs from single photos: lift, look from elsewhere, and know where every pixel went.

The first view is the photo itself, the second a render of its mesh; correspondence comes from the two depth maps, both
ways. A pair is made from a seed, so any pair can be made again from its photo.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data.files import Saved
from l2m_viz.data.images import require_image, resize_image
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.geometry import HW
from l2m_viz.lifting import (
    LiftedScene,
    View,
    ViewSamplerCfg,
    estimate_depth,
    fill_holes,
    lift,
    sample_cameras,
    sample_intrinsics,
    warp_from_depth,
)

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
    # Side of the crop over the largest crop of the right shape.
    crop: Range = (0.6, 1.0)
    # How holes are filled, see `fill_holes`; "background" needs another photo.
    holes: str = "none"
    # Covisible share that both views must have; after each miss the camera moves less.
    min_overlap: float = 0.15
    # Agreement of depths at which two points are one.
    rel_depth_tol: float = 0.05


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
        shares = (mask.float().mean().item() for mask in (self.covisibility_A_to_B, self.covisibility_B_to_A))
        return min(shares)


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
        ShapeError: the pair's size has no room for a mesh.
        L2MError: a negative difficulty, or an overlap that cannot be reached even at rest.
    """
    cfg = cfg or PairCfg()
    require_image("make_pair", image)
    if min(cfg.hw) < 2:
        raise ShapeError("make_pair", expected="at least 2x2 px", got=str(cfg.hw))
    if not 0 <= cfg.difficulty < float("inf"):
        raise L2MError("make_pair", expected="difficulty >= 0", got=f"{cfg.difficulty:g}")
    if seed is None:
        seed = int(torch.randint(0, 2**62, (), generator=generator))
    draw = torch.Generator().manual_seed(seed)
    photo = _random_crop(image, cfg, draw)
    K = sample_intrinsics(cfg.hw, cfg.views, draw)
    scene = lift(photo, estimate_depth(photo, cfg.depth, K=K, generator=draw), K)
    difficulty, overlap = cfg.difficulty, 0.0
    for _ in range(_MAX_TRIES):
        (camera,) = sample_cameras(scene, 1, scaled(cfg.views, difficulty), draw)
        view = scene.render(camera)
        pair = _with_truth(scene, view, cfg, seed)
        overlap = pair.overlap
        if overlap >= cfg.min_overlap:
            filled = fill_holes(view, cfg.holes, background=background, generator=draw)
            return replace(pair, image_B=filled.image, inpainted_mask_B=filled.inpainted_mask)
        difficulty *= 0.7
    got = f"{overlap:.2f} after {_MAX_TRIES} tries"
    todo = "lower min_overlap; the depth may be mostly unknown or cut"
    raise L2MError("make_pair overlap", expected=f"at least {cfg.min_overlap:g}", got=got, todo=todo)


def scaled(cfg: ViewSamplerCfg, difficulty: float) -> ViewSamplerCfg:
    """The sampler's ranges at a place of the curriculum: lengths and angles grow with it from nothing.

    Below 1 the ranges open towards zero as well, so that easy pairs are of all kinds, not of one small size.
    """

    def grown(span: Range) -> Range:
        return span[0] * difficulty * min(1.0, difficulty), span[1] * difficulty

    return replace(cfg, shift=grown(cfg.shift), dolly=grown(cfg.dolly), rotation_deg=grown(cfg.rotation_deg))


_MAX_TRIES = 12  # 0.7^11 is 2 % of the difficulty: nearly at rest


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
    T_B_to_A = torch.linalg.inv(T_A_to_B)
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
