"""Batches of training pairs in plain torch, made where the photos are: on a GPU they never leave it.

What a pair is, and the order of its random numbers, is that of `make_pair`; the photo, the settings and the seed make
the same pair again on the same kind of device, in whatever batch. It is not the pair that `make_pair` makes: random
planes follow other segments, and rounding may move a truth at its tolerance. Where geometry draws nothing
(``depth="flat"``) the two differ by rounding alone.

The host draws all numbers, with generators of the CPU. It waits for the GPU a few times a batch, and once for each
round of cameras to hear which pairs overlap enough; the others get a camera that moves less, all together.
"""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from l2m_viz.data.images import require_image
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.geometry import Camera, intrinsics, invert_pose
from l2m_viz.lifting import (
    LiftedScene,
    Lighting,
    depth_from_disparity,
    lift,
    sample_cameras,
    sample_intrinsics,
    sample_lighting,
    shade_batch,
)
from l2m_viz.lifting.torch_mesh import LiftedBatch, lift_batch, render_batch
from l2m_viz.lifting.torch_planes import random_planes_disparity_batch
from l2m_viz.lifting.torch_truth import warp_from_depth_batch
from l2m_viz.training.pairs import (
    _MAX_TRIES,
    NoPairError,
    PairCfg,
    _happens,
    _random_crop,
    draw_views,
    scaled,
)
from l2m_viz.training.stream import PairBatch

DEPTH_METHODS = ("random-planes", "flat")
FILL_METHODS = ("none", "background")
_Draws = Sequence[torch.Generator]
_Views = dict[
    str, Tensor
]  # fields of `PairBatch` that a camera decides, and "poses" with lengths in scene units


@torch.no_grad()
def make_pairs_batch(
    photos: Float[Tensor, "b h w 3"] | Sequence[Float[Tensor, "_ _ 3"]],
    cfg: PairCfg | None = None,
    generator: torch.Generator | None = None,
    *,
    seeds: Int64[Tensor, " b"] | None = None,
    difficulties: Float64[Tensor, " b"] | None = None,
    names: Sequence[str] | None = None,
    index: int = 0,
) -> PairBatch:
    """Make one pair from each photo, on the photos' device.

    Args:
        photos: RGB in [0, 1], of one size or of any, all on one device. On a GPU values are not checked.
        cfg: Settings; depth "random-planes" or "flat", no sky, holes "none" or "background". Behind the holes of a
            pair is the crop that the pair before it was made from, which no truth depends on.
        generator: On the CPU; draws the pairs' seeds.
        seeds: The seeds themselves, to make pairs again; then ``generator`` is not used.
        difficulties: `PairCfg.difficulty` of each; that of ``cfg`` if None.
        names: What `PairBatch.photos` says; the photos' numbers if None.
        index: Number of the first pair, for `PairBatch.index`.

    Raises:
        ShapeError: no photo, photos of another shape, or not one seed, difficulty and name for each.
        ImageError: a photo on the CPU is not float with values in [0, 1].
        L2MError: settings that only `make_pair` has, or a background for a single photo.
        NoPairError: an overlap that cannot be reached even at rest.
    """
    cfg = cfg or PairCfg()
    if seeds is None:
        seeds = torch.randint(0, 2**62, (len(photos),), generator=generator)
    draws = _generators(photos, cfg, seeds)
    with torch.autocast(photos[0].device.type, enabled=False):  # half precision would blur crops and depth
        images = torch.stack(
            [_random_crop(photo, cfg, draw) for photo, draw in zip(photos, draws, strict=True)]
        )
        Ks = torch.stack([sample_intrinsics(cfg.hw, cfg.views, draw) for draw in draws])
        scenes = _lifted(images, Ks, cfg, draws)
        return pairs_from_scenes(
            scenes, cfg, draws, seeds=seeds, difficulties=difficulties, names=names, index=index
        )


@torch.no_grad()
def pairs_from_scenes(
    scenes: LiftedBatch,
    cfg: PairCfg,
    draws: Sequence[torch.Generator],
    *,
    seeds: Int64[Tensor, " b"] | None = None,
    difficulties: Float64[Tensor, " b"] | None = None,
    names: Sequence[str] | None = None,
    index: int = 0,
) -> PairBatch:
    """The second half of `make_pairs_batch`, for photos that are lifted already: by a network on the GPU, say.

    Args:
        scenes: Photos of ``cfg.hw``, lifted.
        cfg: Settings; those of crops and depth are not used.
        draws: Generators on the CPU, one for each scene.
        seeds: What `PairBatch.seeds` says; those of the generators if None.
        difficulties: As in `make_pairs_batch`.
        names: As in `make_pairs_batch`.
        index: As in `make_pairs_batch`.

    Raises:
        ShapeError: not one generator, seed, difficulty and name for each scene, or scenes of another size.
        L2MError: a filling that only `make_pair` has, or a background for a single scene.
        NoPairError: an overlap that cannot be reached even at rest.
    """
    count = len(scenes.image)
    if seeds is None:
        seeds = torch.tensor([draw.initial_seed() for draw in draws])
    if difficulties is None:
        difficulties = torch.full((count,), cfg.difficulty, dtype=torch.float64)
    names = tuple(str(index + i) for i in range(count)) if names is None else tuple(names)
    _check(scenes, cfg, difficulties, [len(draws), len(seeds), len(names)])
    views = _overlapping(scenes, cfg, difficulties.tolist(), draws)
    image_A, image_B = _relit(scenes, views, cfg, draws)
    inpainted = views["hole_mask_B"] & _chosen([_happens(cfg.p_fill, draw) for draw in draws], scenes)
    if cfg.holes == "background":
        image_B = torch.where(inpainted[..., None], scenes.image.roll(1, dims=0), image_B)
        backgrounds = names[-1:] + names[:-1]
    else:
        inpainted, backgrounds = torch.zeros_like(inpainted), (None,) * count
    return PairBatch(
        image_A=image_A,
        image_B=image_B,
        depth_A=scenes.depth,
        valid_A=scenes.valid_mask,
        valid_B=~views["hole_mask_B"],
        inpainted_mask_B=inpainted,
        K_A=scenes.Ks,
        K_B=scenes.Ks,
        seeds=seeds,
        difficulties=difficulties,
        photos=names,
        backgrounds=backgrounds,
        index=index,
        **{name: views[name] for name in _DECIDED_BY_CAMERA},
    )


_DECIDED_BY_CAMERA = (
    "depth_B", "hole_mask_B", "warp_A_to_B", "covisibility_A_to_B", "warp_B_to_A", "covisibility_B_to_A", "T_A_to_B",
)  # fmt: skip


def _generators(photos: Sequence[Tensor] | Tensor, cfg: PairCfg, seeds: Tensor) -> list[torch.Generator]:
    if len(photos) == 0 or seeds.shape != (len(photos),):
        got = f"{len(photos)} photos, seeds {tuple(seeds.shape)}"
        raise ShapeError("make_pairs_batch", expected="a photo or more, one seed for each", got=got)
    if cfg.depth not in DEPTH_METHODS or cfg.sky is not None or cfg.p_surround > 0:
        expected = f"depth one of {', '.join(DEPTH_METHODS)}, no sky and p_surround 0"
        got = f"depth {cfg.depth}, sky {cfg.sky}, p_surround {cfg.p_surround:g}"
        todo = "use make_pair, or lift and call pairs_from_scenes"
        raise L2MError("make_pairs_batch", expected=expected, got=got, todo=todo)
    for photo in photos:
        if photo.device.type == "cpu":
            require_image("make_pairs_batch", photo)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def _check(scenes: LiftedBatch, cfg: PairCfg, difficulties: Tensor, counts: list[int]) -> None:
    count = len(scenes.image)
    if {*counts, len(difficulties)} != {count} or scenes.hw != tuple(cfg.hw):
        got = f"{count} of {scenes.hw}, {counts} draws, seeds and names, {len(difficulties)} difficulties"
        raise ShapeError("pairs_from_scenes", expected=f"scenes of {cfg.hw}, one of each for each", got=got)
    if not (torch.isfinite(difficulties) & (difficulties >= 0)).all():
        raise L2MError(
            "pairs_from_scenes difficulties", expected="numbers >= 0", got=str(difficulties.tolist())
        )
    if cfg.holes not in FILL_METHODS:
        expected, todo = f"one of {', '.join(FILL_METHODS)}", "use make_pair"
        raise L2MError("pairs_from_scenes holes", expected=expected, got=cfg.holes, todo=todo)
    if cfg.holes == "background" and count < 2:
        raise L2MError('pairs_from_scenes holes="background"', expected="at least 2 photos", got=str(count))


def _lifted(images: Float[Tensor, "b h w 3"], Ks: Tensor, cfg: PairCfg, draws: _Draws) -> LiftedBatch:
    if cfg.depth == "flat":
        depth = torch.ones_like(images[..., 0])
        return lift_batch(images, depth, torch.ones_like(depth, dtype=torch.bool), Ks)
    disparity = random_planes_disparity_batch(images, draws)
    depth = depth_from_disparity(
        disparity.flatten(0, 1)
    )  # the only place that does; all photos as one tall map
    return lift_batch(images, depth.depth.view_as(disparity), depth.valid_mask.view_as(disparity), Ks)


@cache
def _any_scene() -> LiftedScene:
    """Something at distance 1: cameras around it are those of any scene, with lengths in the scene's unit."""
    return lift(torch.zeros(2, 2, 3), torch.ones(2, 2), intrinsics(2.0, (2, 2)))


def _overlapping(scenes: LiftedBatch, cfg: PairCfg, difficulties: list[float], draws: _Draws) -> _Views:
    """Draw cameras until each sees enough of what its photo shows."""
    ranges_of = [draw_views(cfg, draw) for draw in draws]
    views: _Views = {}
    open_pairs, overlaps = list(range(len(draws))), []
    for trial in range(_MAX_TRIES):
        ranges = [scaled(ranges_of[i], difficulties[i] * 0.7**trial) for i in open_pairs]
        poses = [
            sample_cameras(_any_scene(), 1, span, draws[i])[0].w2c
            for i, span in zip(open_pairs, ranges, strict=True)
        ]
        index = torch.tensor(open_pairs, device=scenes.image.device)
        some = scenes if len(open_pairs) == len(draws) else scenes.select(index)
        made = _seen(some, torch.stack(poses), cfg)
        for name, values in made.items():
            if trial == 0:
                views[name] = values
            else:
                views[name][index.to(values.device)] = values
        shares = [
            made[name].float().mean(dim=(1, 2)) for name in ("covisibility_A_to_B", "covisibility_B_to_A")
        ]
        overlaps = torch.minimum(*shares).tolist()  # the host waits here
        open_pairs = [i for i, overlap in zip(open_pairs, overlaps, strict=True) if overlap < cfg.min_overlap]
        if not open_pairs:
            return views
    got = f"{min(overlaps):.2f} after {_MAX_TRIES} tries in pairs {open_pairs}"
    todo = "lower min_overlap; the depth may be mostly unknown or cut"
    raise NoPairError(
        "make_pairs_batch overlap", expected=f"at least {cfg.min_overlap:g}", got=got, todo=todo
    )


def _seen(scenes: LiftedBatch, poses: Float[Tensor, "b 4 4"], cfg: PairCfg) -> _Views:
    """Renders and correspondence both ways, never across a cut edge."""
    T_A_to_B = poses.to(scenes.depth, copy=True)
    T_A_to_B[:, :3, 3] *= scenes.units[:, None]
    view = render_batch(scenes, T_A_to_B)
    A, B = (scenes.depth, scenes.Ks), (view.depth, scenes.Ks)
    covered, solid_A, tol = ~view.hole_mask, scenes.valid_mask & ~scenes.cut_mask, cfg.rel_depth_tol
    warp_A_to_B, seen_A = warp_from_depth_batch(*A, *B, T_A_to_B, scenes.valid_mask, covered, tol)
    warp_B_to_A, seen_B = warp_from_depth_batch(*B, *A, invert_pose(T_A_to_B), covered, solid_A, tol)
    return {
        "image_B": view.image,
        "depth_B": view.depth,
        "hole_mask_B": view.hole_mask,
        "warp_A_to_B": warp_A_to_B,
        "covisibility_A_to_B": seen_A & solid_A,
        "warp_B_to_A": warp_B_to_A,
        "covisibility_B_to_A": seen_B,
        "T_A_to_B": T_A_to_B,
        "poses": poses,
    }


def _relit(
    scenes: LiftedBatch, views: _Views, cfg: PairCfg, draws: _Draws
) -> tuple[Float[Tensor, "b h w 3"], Float[Tensor, "b h w 3"]]:
    """Both images of the pairs that get another light: the same, or each its own."""
    lightings: dict[int, tuple[Lighting, Lighting]] = {}
    for i, draw in enumerate(draws):
        if _happens(cfg.p_relight, draw):
            lighting_A = sample_lighting(1.0, cfg.relight, draw)
            apart = _happens(cfg.p_relight_apart, draw)
            lightings[i] = lighting_A, sample_lighting(1.0, cfg.relight, draw) if apart else lighting_A
    if not lightings:
        return scenes.image, views["image_B"]
    places = list(lightings)
    index = torch.tensor(places, device=scenes.image.device)
    # In units of the scene, as poses and lights were drawn: no length has to come back from the GPU.
    units, Ks = scenes.units[index, None, None], scenes.Ks.cpu()[places]
    poses = torch.eye(4).expand(len(places), 4, 4), views["poses"][places]
    seen = (
        (scenes.image, scenes.depth, scenes.valid_mask),
        (views["image_B"], views["depth_B"], ~views["hole_mask_B"]),
    )
    lit = []
    for (image, depth, valid), w2cs, lights in zip(
        seen, poses, zip(*lightings.values(), strict=True), strict=True
    ):
        cameras = [Camera(K, w2c, cfg.hw[1], cfg.hw[0]) for K, w2c in zip(Ks, w2cs, strict=True)]
        shaded = shade_batch(image[index], depth[index] / units, valid[index], cameras, lights)
        lit.append(image.index_copy(0, index, shaded))
    return lit[0], lit[1]


def _chosen(happens: list[bool], scenes: LiftedBatch) -> Bool[Tensor, "b 1 1"]:
    return torch.tensor(happens, device=scenes.image.device)[:, None, None]
