import pytest
import torch

from l2m_viz.data import write_image
from l2m_viz.errors import L2MError
from l2m_viz.lifting.synthesis import SynthesisCfg
from l2m_viz.training.scenes import SceneCfg, SceneStream

CFG = SceneCfg(hw=(48, 64), views=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_scenes_are_the_same_however_they_are_made(photos, workers):
    stream = iter(SceneStream(photos, CFG, num_workers=workers))
    first = [next(stream) for _ in range(3)]
    later = next(iter(SceneStream(photos, CFG, start=2)))
    assert [len(views) for views in first] == [3, 3, 3]
    for a, b in zip(first[2], later, strict=True):
        torch.testing.assert_close(a.image, b.image)
    assert not torch.equal(first[0][0].image, first[1][0].image)


def test_processes_share_the_scenes(photos):
    alone = iter(SceneStream(photos, CFG))
    numbers = [next(alone) for _ in range(4)]
    second = iter(SceneStream(photos, CFG, start=1, step=2))
    for number in (1, 3):
        torch.testing.assert_close(next(second)[-1].image, numbers[number][-1].image)


def test_holes_show_another_photo_and_count_as_invented(photos):
    cfg = SceneCfg(hw=(48, 64), views=4, difficulty=(1.0, 1.0))
    _, *others = next(iter(SceneStream(photos, cfg)))
    holes = torch.stack([view.hole_mask for view in others])
    assert holes.any()
    assert torch.equal(holes, torch.stack([view.inpainted_mask for view in others]))
    assert torch.stack([view.image for view in others])[holes].std() > 0.05  # not black


def test_an_easy_scene_hardly_moves(photos):
    still = next(iter(SceneStream(photos, SceneCfg(hw=(48, 64), views=3, difficulty=(0.0, 0.0)))))
    for view in still[1:]:
        torch.testing.assert_close(view.camera.w2c, torch.eye(4), atol=1e-6, rtol=0)


def test_what_cannot_be_read_is_skipped_with_one_warning(photos, tmp_path):
    for photo in photos.iterdir():
        (tmp_path / photo.name).write_bytes(photo.read_bytes())
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    stream = iter(SceneStream(tmp_path, CFG))
    with pytest.warns(UserWarning, match=r"broken\.jpg") as caught:
        scenes = [next(stream) for _ in range(6)]
    assert len(caught) == 1
    assert all(len(views) == 3 for views in scenes)


def test_two_views_are_too_few(photos):
    with pytest.raises(L2MError, match="at least 3 views"):
        SceneStream(photos, SceneCfg(views=2))


def test_one_photo_has_no_other_behind_it(tmp_path):
    write_image(tmp_path / "only.png", torch.rand(40, 60, 3))
    with pytest.raises(L2MError, match="at least 2 photos"):
        SceneStream(tmp_path, CFG)
    views = next(
        iter(SceneStream(tmp_path, SceneCfg(hw=(48, 64), views=3, synthesis=SynthesisCfg(holes="none"))))
    )
    assert len(views) == 3
