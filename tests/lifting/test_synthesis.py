"""Several views of one photo."""

import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.errors import L2MError
from l2m_viz.geometry import intrinsics
from l2m_viz.lifting.synthesis import NothingButSkyError, SynthesisCfg, lift_photo, synthesise_views

HW = (60, 84)


@pytest.fixture(scope="module")
def photo():
    return resize_image(load_sample("rocket").image_A, HW)


def test_the_photo_comes_first_and_the_others_look_from_elsewhere(photo):
    K = intrinsics(70.0, HW)
    views = synthesise_views(photo, 4, generator=torch.Generator().manual_seed(0), K=K)
    assert len(views) == 4 and torch.equal(views[0].image, photo)
    assert torch.equal(views[0].camera.w2c, torch.eye(4))
    centers = torch.stack([view.camera.center for view in views])
    assert torch.pdist(centers).min() > 0.1
    for view in views:
        assert torch.equal(view.camera.K, K)
        assert torch.equal(view.inpainted_mask, view.hole_mask)  # telea fills every hole, and says so


def test_the_generator_decides(photo):
    cfg = SynthesisCfg(depth="random-planes", holes="none")
    first, again, other = (
        synthesise_views(photo, 2, cfg, torch.Generator().manual_seed(seed))[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first.image, again.image) and torch.equal(first.camera.K, again.camera.K)
    assert not torch.equal(first.camera.K, other.camera.K)


def test_the_sky_is_in_no_view():
    photo = torch.full((*HW, 3), 0.3)
    photo[:30] = torch.tensor([0.35, 0.55, 0.9])
    photo[30:] = 0.3 * torch.rand(30, HW[1], 3, generator=torch.Generator().manual_seed(0))
    scene = lift_photo(photo, intrinsics(70.0, HW), "prior", "offline")
    assert not scene.valid_mask[:28].any() and scene.valid_mask[32:].all()
    views = synthesise_views(
        photo, 3, SynthesisCfg(holes="none", sky="offline"), torch.Generator().manual_seed(0)
    )
    for view in views[1:]:
        blue = view.image[..., 2] > 0.7
        assert not (blue & ~view.hole_mask).any()
    assert (lift_photo(photo, intrinsics(70.0, HW), "prior").valid_mask).all()


def test_nothing_but_sky_is_an_error_of_its_own(photo, monkeypatch):
    monkeypatch.setattr(
        "l2m_viz.lifting.synthesis.sky_mask", lambda image, *_: torch.ones(image.shape[:2], dtype=torch.bool)
    )
    with pytest.raises(NothingButSkyError, match="not sky"):
        lift_photo(photo, intrinsics(70.0, HW), "prior", "offline")


def test_no_view_is_refused(photo):
    with pytest.raises(L2MError, match="n >= 1"):
        synthesise_views(photo, 0)
