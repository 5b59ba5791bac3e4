import pytest
import torch

from l2m_viz.data import load_sample, write_image
from l2m_viz.encoders.conv_pyramid import ConvPyramid, ConvPyramidCfg
from l2m_viz.errors import L2MError
from l2m_viz.geometry import Camera, intrinsics
from l2m_viz.lifting import View
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.run import RunCfg
from l2m_viz.training.scenes import SceneCfg, SceneStream
from l2m_viz.training.train_encoder import (
    ContrastCfg,
    EncoderTrainingCfg,
    PretrainingCfg,
    feature_goal,
    goal_losses,
    info_nce,
    pretrain_encoder,
    train_encoder,
)

SMALL = ConvPyramidCfg(widths=(8, 12, 16, 24), blocks=(0, 0, 1, 1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("motorcycle", "coffee"):
        sample = load_sample(name)
        write_image(folder / f"{name}.png", sample.image_A[:200, :260])
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def test_info_nce_by_hand():
    a = torch.eye(2)
    loss, hits = info_nce(a, a, temperature=1.0)  # scores 1 on the diagonal, 0 beside it
    assert loss.item() == pytest.approx(-torch.tensor([1.0, 0.0]).log_softmax(0)[0].item())
    assert hits == 1
    _, hits = info_nce(a, a.flip(0), temperature=1.0)
    assert hits == 0


def test_one_point_has_nothing_to_differ_from():
    a = torch.ones(1, 3, requires_grad=True)
    loss, _ = info_nce(a, a, 0.1)
    loss.backward()
    assert loss.item() == 0


def _constant_view(shift_x, image):
    """A view of a wall at distance 1, moved sideways; the photo's own if the shift is 0."""
    hw = (image.shape[0], image.shape[1])
    pose = torch.eye(4)
    pose[0, 3] = -shift_x
    holes = torch.zeros(hw, dtype=torch.bool)
    camera = Camera(intrinsics(60.0, hw), pose, width=hw[1], height=hw[0])
    return View(camera, image, torch.ones(hw), holes, holes.clone())


class _Says(torch.nn.Module):
    """A teacher that answers each view with a number of its own."""

    def forward(self, images):
        b, _, h, w = images.shape
        return {8: torch.arange(1.0, b + 1).view(b, 1, 1, 1).expand(b, 4, h // 8, w // 8)}


def test_the_goal_is_the_mean_of_what_the_teacher_said_where_the_scene_was_seen():
    image = torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(0))
    views = [_constant_view(x, image) for x in (0.0, 0.0, 0.0)]
    goal, seen = feature_goal(_Says(), views, min_alpha=0.9)  # said 1 and 2 of the same surface
    assert goal.shape == (6, 8, 4)
    assert seen.float().mean() > 0.5
    torch.testing.assert_close(goal[seen], torch.full_like(goal[seen], 1.5), atol=1e-3, rtol=0)


def test_holes_of_the_new_view_teach_nothing():
    image = torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(0))
    views = [_constant_view(x, image) for x in (0.0, 0.0, 0.0)]
    views[-1].hole_mask[:, 40:] = True
    _, seen = feature_goal(_Says(), views, min_alpha=0.9)
    assert not seen[:, 5:].any()


def test_a_student_that_says_the_goal_has_nothing_to_learn():
    goal = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(1))
    seen = torch.ones(5, 7, dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    agree, contrast = goal_losses(goal, goal, seen, ContrastCfg(), draw)
    off, worse = goal_losses(goal + 0.5, goal.flip(0), seen, ContrastCfg(), draw)
    assert agree.item() == 0
    assert off > agree
    assert worse > contrast


def test_nothing_seen_gives_zero_and_no_nan():
    said = torch.randn(5, 7, 16, requires_grad=True)
    agree, contrast = goal_losses(
        said, said.detach(), torch.zeros(5, 7, dtype=torch.bool), ContrastCfg(), torch.Generator()
    )
    (agree + contrast).backward()
    assert torch.isfinite(said.grad).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_scenes_are_the_same_however_they_are_made(photos, workers):
    cfg = SceneCfg(hw=(48, 64), views=3)
    with pytest.warns(UserWarning, match=r"broken\.jpg"):
        stream = iter(SceneStream(photos, cfg, num_workers=workers))
        first = [next(stream) for _ in range(3)]
    later = next(iter(SceneStream(photos, cfg, start=2)))
    assert [len(views) for views in first] == [3, 3, 3]
    for a, b in zip(first[2], later, strict=True):
        torch.testing.assert_close(a.image, b.image)
    assert not torch.equal(first[0][0].image, first[1][0].image)


def test_two_views_are_too_few(photos):
    with pytest.raises(L2MError, match="at least 3 views"):
        SceneStream(photos, SceneCfg(views=2))


def test_both_parts_of_stage_1_run_and_resume(photos, tmp_path):
    run = RunCfg(steps=2, log_every=1, warmup_steps=1, bf16=False)
    pretraining = PretrainingCfg(
        encoder=SMALL, run=run, batch_size=2, workers=0,
        pairs=PairCfg(hw=(64, 80), depth="flat", holes="background"),
    )  # fmt: skip
    lines = []
    with pytest.warns(UserWarning, match=r"broken\.jpg"):
        flat = pretrain_encoder(photos, tmp_path / "2d", pretraining, report=lines.append)
    assert isinstance(flat, ConvPyramid)
    assert {"hit_8", "hit_16", "loss"} <= lines[0].keys()
    cfg = EncoderTrainingCfg(
        encoder=SMALL, run=run, scenes=SceneCfg(hw=(64, 80), views=3), batch_size=2, workers=0
    )
    lines.clear()
    with pytest.warns(UserWarning, match=r"broken\.jpg"):
        aware = train_encoder(photos, tmp_path / "3d", flat.state_dict(), cfg, report=lines.append)
    assert lines[0]["seen"] > 0.1
    changed = [not torch.equal(a, b) for a, b in zip(flat.parameters(), aware.parameters(), strict=True)]
    assert any(changed)
    again = train_encoder(photos, tmp_path / "3d", flat.state_dict(), cfg)  # finished: nothing is trained
    for a, b in zip(aware.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)
