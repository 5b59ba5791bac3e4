"""Batches of pairs in plain torch: exact where they say so, those of `make_pair` where no segment is drawn."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l2m_viz.data import load_sample
from l2m_viz.errors import ImageError, L2MError, ShapeError
from l2m_viz.geometry import (
    Camera,
    inside_image,
    intrinsics,
    normalized_grid,
    project,
    sample_image,
    sample_warp,
    to_normalized,
    transform_points,
    unproject_depth,
)
from l2m_viz.geometry.scenes import fronto_parallel_plane, slanted_plane, sphere_on_plane, two_planes
from l2m_viz.lifting import RelightCfg, ViewSamplerCfg, sample_intrinsics, torch_mesh
from l2m_viz.lifting.synthesis import lift_photo
from l2m_viz.lifting.torch_mesh import LiftedBatch, lift_batch
from l2m_viz.training import PairBatch, PairCfg, make_pair, torch_pairs
from l2m_viz.training.pairs import NoPairError, _random_crop
from l2m_viz.training.torch_pairs import make_pairs_batch, pairs_from_scenes

HW = (72, 96)
NAMES = ("coffee", "astronaut", "rocket", "chelsea")
SEEDS = torch.tensor([3, 1, 4, 15])
MAPS = ("hole_mask_B", "covisibility_A_to_B", "covisibility_B_to_A")  # bool
VALUES = ("image_A", "image_B", "depth_A", "depth_B", "warp_A_to_B", "warp_B_to_A", "K_A", "K_B", "T_A_to_B")


@pytest.fixture(scope="module")
def photos():
    """Of four sizes."""
    return [load_sample(name).image_A for name in NAMES]


@pytest.fixture(scope="module")
def batch(photos):
    return make_pairs_batch(photos, PairCfg(hw=HW, difficulty=0.7), seeds=SEEDS)


def _draws(seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def _same(batch: PairBatch, k: int, pair, share: float = 1e-3) -> None:
    """But for pixels on an outline or a tolerance."""
    for name in MAPS:
        assert (getattr(batch, name)[k] != getattr(pair, name)).float().mean() <= share, name
    for name in VALUES:
        ours, theirs = getattr(batch, name)[k], getattr(pair, name)
        assert ((ours - theirs).abs() > 1e-3).float().mean() <= share, name


@pytest.mark.parametrize("settings", [{}, {"p_relight": 1.0}, {"p_roll": 0.5}])
def test_on_a_flat_photo_pairs_are_those_of_make_pair(photos, settings):
    """Crops, intrinsics, cameras, rejection, renders, truth and light: all but the random planes."""
    views = ViewSamplerCfg(roll_deg=(60.0, 120.0)) if settings.get("p_roll") else ViewSamplerCfg()
    cfg = PairCfg(hw=HW, depth="flat", views=views, min_overlap=0.3, **settings)
    batch = make_pairs_batch(photos, cfg, seeds=SEEDS)
    for k, photo in enumerate(photos):
        _same(batch, k, make_pair(photo, cfg, seed=int(SEEDS[k])))


def test_from_the_same_geometry_pairs_are_those_of_make_pair(photos):
    """What follows the depth, on the random planes that `make_pair` draws."""
    cfg, draws, lifted = PairCfg(hw=HW, p_relight=0.5, min_overlap=0.3), _draws(SEEDS), []
    for photo, draw in zip(photos, draws, strict=True):
        crop = _random_crop(photo, cfg, draw)
        lifted.append(lift_photo(crop, sample_intrinsics(HW, cfg.views, draw), cfg.depth, None, draw))
    fields = ("image", "depth", "valid_mask", "K")
    scenes = lift_batch(*(torch.stack([getattr(scene, name) for scene in lifted]) for name in fields))
    batch = pairs_from_scenes(scenes, cfg, draws, seeds=SEEDS)
    tries = 0
    for k, photo in enumerate(photos):
        pair = make_pair(photo, cfg, seed=int(SEEDS[k]))
        _same(batch, k, pair)
        tries += pair.T_A_to_B[:3, 3].norm() < 0.8 * lifted[k].unit * 0.45  # below the range: drawn again
    assert tries > 0


def test_the_warp_is_the_projection_of_the_depth(batch):
    for k in range(len(NAMES)):
        points = transform_points(batch.T_A_to_B[k], unproject_depth(batch.depth_A[k], batch.K_A[k]))
        expected = to_normalized(project(points, batch.K_B[k])[0], HW)
        seen = batch.covisibility_A_to_B[k]
        torch.testing.assert_close(batch.warp_A_to_B[k][seen], expected[seen], atol=1e-4, rtol=0)


def test_covisible_points_look_alike_lie_at_one_depth_and_come_back(batch):
    for k in range(len(NAMES)):
        seen, warp = batch.covisibility_A_to_B[k], batch.warp_A_to_B[k]
        assert min(seen.float().mean(), batch.covisibility_B_to_A[k].float().mean()) >= 0.15
        error = (sample_image(batch.image_B[k], warp) - batch.image_A[k]).abs().mean(dim=-1)
        assert error[seen].median() < 0.03
        points = transform_points(batch.T_A_to_B[k], unproject_depth(batch.depth_A[k], batch.K_A[k]))
        rendered = sample_image(batch.depth_B[k], warp, mode="nearest")
        off = (rendered / points[..., 2] - 1).abs()[seen]
        assert (
            off.median() < 0.01 and (off < 0.05).float().mean() > 0.95
        )  # bilinear depth vouches for the rest
        both = sample_image(batch.covisibility_B_to_A[k].float(), warp[seen]) > 0.999
        back = sample_warp(batch.warp_B_to_A[k], warp[seen])[both]
        error_px = (back - normalized_grid(HW)[seen][both]).norm(dim=-1) * HW[1] / 2
        assert both.float().mean() > 0.7 and error_px.median() < 0.05


def test_covisible_means_known_inside_and_no_hole(batch):
    assert batch.hole_mask_B.any(dim=(1, 2)).all()
    for there, back, valid, target in (
        (batch.covisibility_A_to_B, batch.warp_A_to_B, batch.valid_A, batch.valid_B),
        (batch.covisibility_B_to_A, batch.warp_B_to_A, batch.valid_B, batch.valid_A),
    ):
        assert not (there & ~valid).any() and inside_image(back[there]).all()
        for k in range(len(NAMES)):
            landed = sample_image(target[k].float(), back[k], mode="nearest")
            assert (landed[there[k]] == 1).all()
    assert torch.equal(batch.valid_B, ~batch.hole_mask_B)


@pytest.mark.parametrize("make", [fronto_parallel_plane, slanted_plane, two_planes, sphere_on_plane])
def test_truth_is_that_of_the_analytic_scene(make):
    """Whose covisibility never looks at a depth map; what the photo does not show, a camera on the scene may see."""
    scenes = _analytic(make(), count=3)
    inner = torch.zeros(
        HW, dtype=torch.bool
    )  # the outermost pixels are on the mesh's outline: half of them fall off
    inner[1:-1, 1:-1] = True
    batch = pairs_from_scenes(scenes, PairCfg(hw=HW, difficulty=0.5), _draws(SEEDS[:3]))
    for k in range(3):
        A, B = (Camera(batch.K_A[k], w2c, HW[1], HW[0]) for w2c in (torch.eye(4), batch.T_A_to_B[k]))
        exact, covisible = make().warp(A, B)
        seen = batch.covisibility_A_to_B[k]
        torch.testing.assert_close(batch.warp_A_to_B[k][covisible], exact[covisible], atol=1e-4, rtol=0)
        assert (seen & ~covisible).float().mean() < 0.01
        assert (covisible & ~scenes.cut_mask[k] & inner & ~seen).float().mean() < 0.01
        exact, covisible = make().warp(B, A)
        seen = batch.covisibility_B_to_A[k]
        assert (exact - batch.warp_B_to_A[k])[seen].abs().median() < 1e-4
        assert (seen & ~covisible).float().mean() < 0.01


def _analytic(scene, count: int) -> LiftedBatch:
    camera = Camera(intrinsics(60.0, HW), torch.eye(4), HW[1], HW[0])
    depth, valid = scene.depth(camera)
    image = scene.image(camera, period=3.0)
    stacked = (value.expand(count, *value.shape) for value in (image, depth, valid, camera.K))
    return lift_batch(*stacked)


def test_a_seed_makes_the_same_pair_in_any_batch(photos):
    cfg = PairCfg(hw=HW, p_relight=0.5)
    first = make_pairs_batch(photos, cfg, torch.Generator().manual_seed(2))
    again = make_pairs_batch(photos, cfg, seeds=first.seeds)
    other = make_pairs_batch(photos[2:][::-1], cfg, seeds=first.seeds[2:].flip(0))
    for name in (*MAPS, *VALUES):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
        here, there = getattr(first, name)[2:].float(), getattr(other, name).flip(0).float()
        assert ((here - there).abs() > 1e-3).float().mean() <= 1e-3, name
    assert len(set(first.seeds.tolist())) == len(NAMES)
    assert not torch.equal(first.warp_A_to_B, make_pairs_batch(photos, cfg, seeds=SEEDS).warp_A_to_B)


def test_photos_may_come_as_one_tensor(photos):
    stacked = torch.stack([photo[:300, :400] for photo in photos])
    cfg = PairCfg(hw=HW)
    ours, theirs = (make_pairs_batch(each, cfg, seeds=SEEDS) for each in (stacked, list(stacked)))
    assert torch.equal(ours.image_B, theirs.image_B)


def test_each_pair_has_a_difficulty_of_its_own(photos):
    difficulties = torch.tensor([0.0, 0.2, 0.6, 1.0], dtype=torch.float64)
    cfg = PairCfg(hw=HW, depth="flat", min_overlap=0.0)
    batch = make_pairs_batch(photos, cfg, seeds=SEEDS, difficulties=difficulties)
    moves = batch.T_A_to_B[:, :3, 3].norm(dim=1)
    assert moves[0] == 0 and (moves.diff() > 0).all()
    assert torch.equal(batch.difficulties, difficulties)
    for k, photo in enumerate(photos):
        _same(batch, k, make_pair(photo, replace(cfg, difficulty=difficulties[k].item()), seed=int(SEEDS[k])))


def test_behind_the_holes_is_the_photo_before(photos):
    cfg = PairCfg(hw=HW, holes="background", p_fill=0.6, p_relight=0.5)
    seeds = torch.arange(8)
    batch = make_pairs_batch(photos * 2, cfg, seeds=seeds, names=[f"{k}.jpg" for k in range(8)], index=40)
    plain = make_pairs_batch(photos * 2, replace(cfg, holes="none"), seeds=seeds)
    unlit = make_pairs_batch(photos * 2, replace(cfg, p_relight=0.0), seeds=seeds)
    filled = batch.inpainted_mask_B.any(dim=(1, 2))
    assert filled.any() and not filled.all()
    for k in range(8):
        holes = batch.hole_mask_B[k]
        assert torch.equal(batch.inpainted_mask_B[k], holes & filled[k])
        behind = unlit.image_A[k - 1] if filled[k] else torch.zeros(*HW, 3)
        assert torch.equal(batch.image_B[k][holes], behind[holes])
        assert torch.equal(batch.image_B[k][~holes], plain.image_B[k][~holes])
        assert not (batch.inpainted_mask_B[k] & batch.covisibility_B_to_A[k]).any()
    assert batch.backgrounds == ("7.jpg", *batch.photos[:-1]) and batch.next_index == 48
    assert not plain.inpainted_mask_B.any() and plain.backgrounds == (None,) * 8


def test_light_changes_colours_and_nothing_else(photos):
    shadowless = RelightCfg(shadow_probability=0.0)
    plain, lit = (
        make_pairs_batch(photos, PairCfg(hw=HW, p_relight=p, relight=shadowless), seeds=SEEDS)
        for p in (0.0, 1.0)
    )
    for name in (*MAPS, "depth_B", "warp_A_to_B", "T_A_to_B"):
        assert torch.equal(getattr(plain, name), getattr(lit, name))
    for name in ("image_A", "image_B"):
        before, after = getattr(plain, name), getattr(lit, name)
        assert (
            (before - after).abs().mean(dim=(1, 2, 3)) > 0.01
        ).all() and 0 <= after.min() <= after.max() <= 1
    assert not lit.image_B[lit.hole_mask_B].any()


class _Waits(TorchDispatchMode):
    """Counts what a GPU would have to answer before the host could go on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_renders_and_truth_wait_for_the_device_as_often_for_many_pairs_as_for_one(monkeypatch):
    monkeypatch.setitem(torch_mesh._CHUNK, "cpu", torch_mesh._CHUNK_ELSEWHERE)
    counts = []
    for count in (1, 6):
        scenes, poses = _analytic(two_planes(), count), torch.eye(4).repeat(count, 1, 1)
        poses[:, 0, 3] = 0.2
        with _Waits() as waits:
            torch_pairs._seen(scenes, poses, PairCfg(hw=HW))
        counts.append(waits.count)
    assert counts[0] == counts[1] <= 4


def test_a_training_s_precision_does_not_blur_the_truth(photos, batch):
    with torch.autocast("cpu", torch.bfloat16):
        under = make_pairs_batch(photos, PairCfg(hw=HW, difficulty=0.7), seeds=SEEDS)
    for name in (*MAPS, *VALUES):
        assert torch.equal(getattr(batch, name), getattr(under, name)), name
        assert not getattr(under, name).requires_grad


def test_inputs_stay_as_they_are(photos):
    stacked = torch.stack(
        [photo[: HW[0], : HW[1]] for photo in photos]
    )  # of the pairs' size: no crop copies them
    kept, cfg = stacked.clone(), PairCfg(hw=HW, crop=(1.0, 1.0), p_relight=1.0, holes="background")
    make_pairs_batch(stacked, cfg, seeds=SEEDS)
    assert torch.equal(stacked, kept)


def test_what_cannot_be_made_is_refused(photos, unchecked):
    cfg = PairCfg(hw=HW)
    for settings in ({"depth": "prior"}, {"sky": "offline"}, {"holes": "telea"}):
        with pytest.raises(L2MError, match="make_pair"):
            make_pairs_batch(photos, replace(cfg, **settings), seeds=SEEDS)
    with pytest.raises(L2MError, match="at least 2 photos"):
        make_pairs_batch(photos[:1], replace(cfg, holes="background"), seeds=SEEDS[:1])
    with pytest.raises(ShapeError, match="one seed"):
        make_pairs_batch(photos, cfg, seeds=SEEDS[:3])
    with pytest.raises(ShapeError, match="a photo or more"):
        make_pairs_batch([], cfg)
    with pytest.raises(ShapeError, match="names"):
        make_pairs_batch(photos, cfg, seeds=SEEDS, names=["one"])
    with pytest.raises(L2MError, match="difficulties"):
        make_pairs_batch(photos, cfg, seeds=SEEDS, difficulties=torch.tensor([0.1, 0.2, -1.0, 0.3]))
    with pytest.raises(ImageError, match="make_pairs_batch"):
        make_pairs_batch([photo + 1 for photo in photos], cfg, seeds=SEEDS)
    with pytest.raises(NoPairError, match=r"in pairs \[0, 1, 2, 3\]"):
        make_pairs_batch(photos, replace(cfg, min_overlap=1.1), seeds=SEEDS)


@pytest.mark.gpu
def test_a_gpu_makes_the_pairs_of_the_cpu(photos):
    cfg = PairCfg(hw=HW, holes="background", p_relight=0.5)
    ours = make_pairs_batch(photos, cfg, seeds=SEEDS)
    theirs = make_pairs_batch([photo.cuda() for photo in photos], cfg, seeds=SEEDS)
    again = make_pairs_batch([photo.cuda() for photo in photos], cfg, seeds=SEEDS)
    assert theirs.image_B.is_cuda and theirs.warp_A_to_B.is_cuda
    for name in (*MAPS, *VALUES):
        assert torch.equal(getattr(theirs, name), getattr(again, name)), name
        off = (getattr(theirs, name).cpu().float() - getattr(ours, name).float()).abs() > 1e-2
        assert off.float().mean() < 0.02, name  # a segment's border may fall on the next pixel
