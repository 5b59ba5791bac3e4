"""Feature lifting: the closed form against dense weights, the optimiser against what must and must not move."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.errors import FileFormatError, L2MError, ShapeError
from l2m_viz.evaluation import psnr
from l2m_viz.gaussians import (
    FeatureView,
    FitCfg,
    Gaussians,
    LiftedFeatures,
    gaussians_from_depth,
    lift_features,
    lift_features_steps,
    rasterize,
)
from l2m_viz.geometry import Camera, intrinsics, normalized_grid, pose_from_rotation, sample_image
from l2m_viz.lifting import Depth, lift

HW, CELLS = (38, 53), (9, 13)
GEOMETRY = ["means", "quats", "log_scales", "logit_opacities", "colors"]


def _camera(x: float) -> Camera:
    return Camera(
        intrinsics(48.0, HW), pose_from_rotation(torch.eye(3), torch.tensor([-x, 0.0, 0.0])), HW[1], HW[0]
    )


@pytest.fixture
def gaussians() -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(1, 1, 4, 5, generator=generator)
    depth = 2 + torch.nn.functional.interpolate(rough, HW, mode="bicubic")[0, 0]
    return gaussians_from_depth(torch.rand(*HW, 3, generator=generator), depth, _camera(0.0).K)


@pytest.fixture
def views() -> list[FeatureView]:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(*CELLS, 11, generator=generator) for _ in range(3)]
    masks = [torch.rand(*CELLS, generator=generator) > 0.2, None, None]
    return [FeatureView(_camera(0.1 * i), maps[i], masks[i]) for i in range(3)]


def _with_images(views, gaussians) -> list[FeatureView]:
    return [replace(view, image=rasterize(gaussians, view.camera).color.clamp(0, 1) * 0.8) for view in views]


def _dense_weights(gaussians: Gaussians, camera: Camera) -> torch.Tensor:
    """Weight of every Gaussian in every pixel (N, H W), from features that are one-hot."""
    blocks = []
    for some in torch.arange(len(gaussians)).split(256):
        one_hot = torch.zeros(len(gaussians), len(some))
        one_hot[some, torch.arange(len(some))] = 1
        blocks.append(rasterize(replace(gaussians, features=one_hot), camera, backend="reference").features)
    return torch.cat(blocks, dim=-1).flatten(0, 1).T


def test_closed_form_is_the_weighted_mean_of_the_pixels(gaussians, views):
    few = gaussians.select(torch.arange(0, len(gaussians), 4))
    sums, weights = torch.zeros(len(few), 11), torch.zeros(len(few))
    for view in views:
        dense = _dense_weights(few, view.camera)
        grid = normalized_grid(HW)
        mask = torch.ones(CELLS) if view.mask is None else view.mask.float()
        known = (sample_image(mask, grid) > 1 - 1e-5).flatten()
        dense = dense * known
        sums += dense @ sample_image(view.features, grid).flatten(0, 1)
        weights += dense.sum(dim=1)
    lifted = lift_features(few, views)
    torch.testing.assert_close(lifted.weights, weights, atol=2e-4, rtol=2e-4)
    seen = weights > 0.01
    assert seen.sum() > 400
    expected = sums[seen] / weights[seen, None]
    torch.testing.assert_close(lifted.gaussians.features[seen], expected, atol=2e-3, rtol=2e-3)


def test_a_constant_map_gives_every_seen_gaussian_that_constant(gaussians):
    constant = torch.tensor([0.5, -2.0, 7.0])
    behind = replace(gaussians, means=gaussians.means * torch.tensor([1.0, 1.0, -1.0]))
    lifted = lift_features(
        Gaussians.concat([gaussians, behind]), [FeatureView(_camera(0.0), constant.expand(3, 4, 3))]
    )
    n = len(gaussians)
    torch.testing.assert_close(lifted.gaussians.features[:n], constant.expand(n, 3), atol=1e-4, rtol=1e-4)
    assert not lifted.gaussians.features[n:].any() and not lifted.weights[n:].any()
    rendered = rasterize(lifted.gaussians, _camera(0.05))
    inner = rendered.alpha > 0.9
    ratio = rendered.features[inner] / rendered.alpha[inner][:, None]
    torch.testing.assert_close(ratio, constant.expand_as(ratio), atol=1e-3, rtol=1e-3)


def test_masked_cells_say_nothing(gaussians):
    mask = torch.zeros(CELLS, dtype=torch.bool)
    mask[:, :6] = True
    features = torch.where(mask[..., None], 1.0, torch.nan).expand(*CELLS, 2).contiguous()
    lifted = lift_features(gaussians, [FeatureView(_camera(0.0), features, mask)])
    features = lifted.gaussians.features.reshape(*HW, 2)
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features[:, :18], torch.ones(HW[0], 18, 2), atol=1e-4, rtol=0)
    assert not features[:, 30:].any()


def test_several_views_add_up_whatever_the_number_of_threads(gaussians, views):
    import numba

    all_threads = lift_features(gaussians, views)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        one_thread = lift_features(gaussians, views)
    finally:
        numba.set_num_threads(before)
    torch.testing.assert_close(
        all_threads.gaussians.features, one_thread.gaussians.features, atol=1e-4, rtol=1e-3
    )


def test_the_rasterizers_backward_pass_gives_the_same(gaussians, views):
    """What is used on a GPU: the gradient of rendered features by the features."""
    from l2m_viz.gaussians.lift_features import _by_backward_pass

    sums, weights = torch.zeros(len(gaussians), 11), torch.zeros(len(gaussians))
    for view in views:
        _by_backward_pass(gaussians, view, sums, weights)
    lifted = lift_features(gaussians, views)
    torch.testing.assert_close(lifted.weights, weights, atol=1e-4, rtol=1e-4)
    assert lifted.gaussians.features is not None
    torch.testing.assert_close(lifted.gaussians.features * weights[:, None], sums, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["closed-form", "optimise"])
def test_stopped_and_resumed_it_is_the_same(gaussians, views, method, tmp_path):
    views = _with_images(views, gaussians)
    path, cfg = tmp_path / "state.npz", FitCfg(num_steps=5, width=4)
    whole = lift_features(gaussians, views, method, cfg)
    steps = lift_features_steps(gaussians, views, method, cfg, checkpoint=path)
    done = list(islice(steps, 2))
    steps.close()
    assert [step.step for step in done] == [1, 2] and path.exists()
    seen = []
    resumed = lift_features(
        gaussians, views, method, cfg, checkpoint=path, progress=lambda step: seen.append(step.step)
    )
    assert seen[0] == 3 and seen[-1] == (3 if method == "closed-form" else 5)
    torch.testing.assert_close(resumed.gaussians.features, whole.gaussians.features, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(resumed.gaussians.means, whole.gaussians.means, atol=1e-7, rtol=1e-6)
    again = lift_features(gaussians, views, method, cfg, checkpoint=path)  # done already: only read
    assert torch.equal(again.gaussians.features, resumed.gaussians.features)


def test_an_exception_of_the_caller_loses_nothing(gaussians, views, tmp_path):
    def stop(step):
        raise KeyboardInterrupt

    path = tmp_path / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        lift_features(gaussians, views, checkpoint=path, progress=stop)
    seen = []
    lift_features(gaussians, views, checkpoint=path, progress=lambda step: seen.append(step.step))
    assert seen == [2, 3]


def test_a_foreign_checkpoint_is_refused(gaussians, views, tmp_path):
    path = tmp_path / "state.npz"
    lift_features(gaussians, views, checkpoint=path)
    with pytest.raises(FileFormatError, match="other inputs"):
        lift_features(gaussians, views[:2], checkpoint=path)
    with pytest.raises(FileFormatError, match="other inputs"):
        lift_features(
            gaussians, _with_images(views, gaussians), "optimise", FitCfg(num_steps=2), checkpoint=path
        )
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError):
        lift_features(gaussians, views, checkpoint=path)


def test_features_never_move_the_geometry(gaussians, views):
    cfg = FitCfg(num_steps=4, width=4)
    lifted = lift_features(gaussians, views, "optimise", cfg)
    for name in GEOMETRY:
        assert torch.equal(getattr(lifted.gaussians, name), getattr(gaussians, name)), name
    both = _with_images(views, gaussians)
    with_features = lift_features(gaussians, both, "optimise", cfg).gaussians
    only_images = [replace(view, features=None, mask=None) for view in both]
    without = lift_features(gaussians, only_images, "optimise", cfg).gaussians
    assert without.features is None
    for name in GEOMETRY:
        assert torch.equal(getattr(with_features, name), getattr(without, name)), name
        assert not torch.equal(getattr(with_features, name), getattr(gaussians, name)), name


@pytest.mark.parametrize(("init", "fall"), [("closed-form", 0.97), ("zeros", 0.9)])
def test_optimising_lowers_the_feature_loss(gaussians, init, fall):
    # a network's features that a few directions of space explain
    generator = torch.Generator().manual_seed(3)
    positions = lift_features(gaussians, [FeatureView(_camera(0.0), normalized_grid(HW))]).gaussians.features
    carried = torch.cat([positions, positions.square(), torch.ones(len(gaussians), 1)], dim=1)
    true = replace(gaussians, features=carried @ torch.randn(5, 20, generator=generator))
    views = [FeatureView(_camera(x), rasterize(true, _camera(x)).features) for x in (0.0, 0.1)]
    cfg = FitCfg(
        num_steps=40, width=5, init=init, features_lr=2e-2, up_projection_lr=2e-2 if init == "zeros" else 1e-4
    )
    steps = list(lift_features_steps(gaussians, views, "optimise", cfg))
    losses = torch.tensor([step.losses["features"] for step in steps])
    assert losses[-4:].mean() < fall * losses[:4].mean()
    lifted = steps[-1].lifted()
    assert lifted.gaussians.features.shape == (len(gaussians), 5)
    decoded = lifted.decode(rasterize(lifted.gaussians, views[0].camera).features)
    assert decoded.shape == (*HW, 20)
    target = views[0].features
    assert target is not None
    share = 0.15 if init == "closed-form" else 0.8  # of what saying nothing would cost
    assert (decoded - target).abs().mean() < share * target.abs().mean()


def test_lifted_features_survive_a_file(gaussians, views, tmp_path):
    lifted = lift_features(gaussians, views, "optimise", FitCfg(num_steps=1, width=4))
    lifted.save(tmp_path / "lifted.npz")
    back = LiftedFeatures.load(tmp_path / "lifted.npz")
    assert torch.equal(back.gaussians.features, lifted.gaussians.features)
    assert torch.equal(back.up_projection, lifted.up_projection) and torch.equal(back.weights, lifted.weights)


def test_impossible_input_is_refused(gaussians, views, unchecked):
    with pytest.raises(ShapeError, match="at least one view"):
        lift_features(gaussians, [])
    narrow = FeatureView(_camera(0.0), torch.zeros(*CELLS, 2))
    with pytest.raises(ShapeError, match="one width"):
        lift_features(gaussians, [*views, narrow])
    with pytest.raises(L2MError, match="'closed-form' or 'optimise'"):
        lift_features(gaussians, views, "magic")
    with pytest.raises(L2MError, match="at least one step"):
        lift_features(gaussians, views, "optimise", FitCfg(num_steps=0))
    with pytest.raises(ShapeError, match="a view without"):
        lift_features(gaussians, [FeatureView(_camera(0.0), image=torch.zeros(*HW, 3))])
    with pytest.raises(ShapeError, match="neither"):
        FeatureView(_camera(0.0))
    with pytest.raises(ShapeError, match="camera's"):
        FeatureView(_camera(0.0), image=torch.zeros(53, 38, 3))
    with pytest.raises(ShapeError, match="mask of the same size"):
        FeatureView(_camera(0.0), torch.zeros(*CELLS, 2), torch.ones(13, 9, dtype=torch.bool))
    with pytest.raises(L2MError, match="NaN"):
        FeatureView(_camera(0.0), torch.full((*CELLS, 2), torch.nan))
    blown = FitCfg(num_steps=3, means_lr=1e38, width=2)
    with pytest.raises(L2MError, match="finite"):
        lift_features(gaussians, _with_images(views, gaussians), "optimise", blown)


def test_fitting_both_real_views_helps_where_nothing_was_shown():
    """A stereo pair at half size; a fifth of the right view's blocks is left out of the loss."""
    sample = load_sample("motorcycle")
    hw = (250, 370)
    image_A, image_B = (resize_image(image, hw) for image in (sample.image_A, sample.image_B))
    depth = Depth(sample.depth_A, sample.valid_A, "metric", "measured").resized(hw)
    full = sample.depth_A.shape
    A = Camera(sample.K_A, torch.eye(4), full[1], full[0]).resized(hw)
    B = Camera(sample.K_B, sample.T_A_to_B, full[1], full[0]).resized(hw)
    start = gaussians_from_depth(image_A, depth, A.K)
    blocks = torch.rand(-(-hw[0] // 16), -(-hw[1] // 16), generator=torch.Generator().manual_seed(0)) < 0.2
    held_out = blocks.repeat_interleave(16, dim=0).repeat_interleave(16, dim=1)[: hw[0], : hw[1]]
    covered = held_out & ~lift(image_A, depth, A.K).render(B).hole_mask
    views = [FeatureView(A, image=image_A), FeatureView(B, image=image_B, image_mask=~held_out)]
    fitted = lift_features(start, views, "optimise", FitCfg(num_steps=24)).gaussians
    before, after = (psnr(rasterize(some, B).color, image_B, covered) for some in (start, fitted))
    left = psnr(rasterize(fitted, A).color, image_A, depth.valid_mask)
    print(f"held out {before:.2f} -> {after:.2f} dB, left view {left:.2f} dB")
    assert after >= before + 1 and left >= 30
