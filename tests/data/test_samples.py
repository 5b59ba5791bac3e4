"""The embedded samples: numbers from Middlebury's calibration, and photometry as an independent judge."""

import socket

import numpy as np
import pytest
import torch

from l2m_viz.data import Sample, list_samples, load_sample, samples
from l2m_viz.errors import L2MError, MissingError
from l2m_viz.geometry import inside_image, project, sample_image, to_pixel, transform_points, unproject_depth


@pytest.fixture(scope="module")
def motorcycle() -> Sample:
    return load_sample("motorcycle")


def photometric_error(sample: Sample, mask: torch.Tensor, dx: float = 0.0, dy: float = 0.0) -> float:
    """Mean |A(x) - B(warp(x) + shift)| over a mask."""
    assert sample.image_B is not None and sample.warp_A_to_B is not None
    height, width = sample.image_A.shape[:2]
    warp = sample.warp_A_to_B + 2 * torch.tensor([dx / width, dy / height])
    return float((sample_image(sample.image_B, warp) - sample.image_A).abs().mean(-1)[mask].mean())


def test_list_samples():
    assert list_samples() == ["motorcycle", "astronaut", "coffee", "chelsea", "rocket"]
    list_samples().clear()
    assert list_samples()


@pytest.mark.parametrize(
    ("name", "hw"),
    [("astronaut", (512, 512)), ("coffee", (400, 600)), ("chelsea", (300, 451)), ("rocket", (427, 640))],
)
def test_single_photos(name, hw, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    sample = load_sample(name)
    assert sample.name == name and sample.source
    assert tuple(sample.image_A.shape) == (*hw, 3)
    assert 0.1 < sample.image_A.mean() < 0.9 and sample.image_A.std() > 0.1
    assert (
        sample.image_B is None
        and sample.depth_A is None
        and sample.warp_A_to_B is None
        and sample.K_A is None
    )


def test_motorcycle_calibration(motorcycle):
    assert tuple(motorcycle.image_A.shape) == tuple(motorcycle.image_B.shape) == (500, 741, 3)
    # Middlebury 2014, Motorcycle, calib.txt at full size: f 3979.911, cx 1244.772, cy 1019.507, doffs 124.343
    expected = torch.tensor([[3979.911 / 4, 0, 1244.772 / 4], [0, 3979.911 / 4, 1019.507 / 4], [0, 0, 1]])
    torch.testing.assert_close(motorcycle.K_A, expected, atol=1e-3, rtol=0)
    expected[0, 2] += 124.343 / 4
    torch.testing.assert_close(motorcycle.K_B, expected, atol=1e-3, rtol=0)
    assert torch.equal(motorcycle.T_A_to_B[:3, :3], torch.eye(3))
    torch.testing.assert_close(motorcycle.T_A_to_B[:, 3], torch.tensor([-0.193001, 0, 0, 1]))


def test_motorcycle_depth(motorcycle):
    depth = motorcycle.depth_A[motorcycle.valid_A]
    assert float(depth.min()) == pytest.approx(2.110, abs=1e-3)
    assert float(depth.max()) == pytest.approx(5.017, abs=1e-3)
    assert float(motorcycle.valid_A.float().mean()) == pytest.approx(0.9265, abs=1e-4)
    assert torch.isfinite(motorcycle.depth_A).all() and (motorcycle.depth_A > 0).all()


def test_motorcycle_warp_is_what_depth_and_cameras_say(motorcycle):
    points = transform_points(motorcycle.T_A_to_B, unproject_depth(motorcycle.depth_A, motorcycle.K_A))
    points_px, depth_B = project(points, motorcycle.K_B)
    valid = motorcycle.valid_A
    assert torch.isfinite(motorcycle.warp_A_to_B).all()
    difference = (points_px - to_pixel(motorcycle.warp_A_to_B, (500, 741)))[valid]
    assert difference.abs().max() < 1e-3
    assert torch.equal(depth_B, motorcycle.depth_A)  # rectified: the same z in both


def test_motorcycle_photometry(motorcycle):
    """The right picture, read where the warp says, is the left one, to a fraction of a pixel."""
    mask = motorcycle.covisibility_A_to_B
    here = photometric_error(motorcycle, mask)
    assert here < 0.02
    for dx, dy in [(1, 0), (-1, 0), (0, 1), (0, -1)]:
        assert photometric_error(motorcycle, mask, dx, dy) > 1.8 * here
    for dx, dy in [(0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)]:
        assert photometric_error(motorcycle, mask, dx, dy) > 1.25 * here


def test_motorcycle_covisibility(motorcycle):
    covisible, valid = motorcycle.covisibility_A_to_B, motorcycle.valid_A
    inside = valid & inside_image(motorcycle.warp_A_to_B)
    assert not (covisible & ~inside).any()
    assert 0.80 < float(covisible.float().mean()) < 0.87
    occluded = inside & ~covisible
    assert photometric_error(motorcycle, occluded) > 8 * photometric_error(motorcycle, covisible)
    # what the left camera sees beside the left edges of near things hides behind them in the right view
    assert 0.01 < float(occluded.float().mean()) < 0.08


def test_occlusion_by_brute_force():
    """A near bar before a slanted wall: ask, for every pixel, who else lands in its columns."""
    height, width = 3, 40
    disparity = torch.linspace(2.0, 6.0, width).repeat(height, 1)
    disparity[:, 15:22] = 11.3
    disparity[2, 15:22] = 4.0  # here the bar lies nearly on the wall: within the tolerance nothing is hidden
    valid = torch.ones(height, width, dtype=torch.bool)
    valid[1, 15:22] = False  # here the bar is unknown and hides nothing
    seen = samples._unoccluded(disparity, valid)
    for y in range(height):
        for x in range(width):
            x_B = x - float(disparity[y, x])
            columns = {int(np.floor(x_B)), int(np.floor(x_B)) + 1} & set(range(width))
            blockers = [
                u
                for u in range(width)
                if valid[y, u]
                and disparity[y, u] > disparity[y, x] + 1
                and columns & {int(np.floor(u - float(disparity[y, u]))) + step for step in (0, 1)}
            ]
            assert bool(seen[y, x]) == (bool(valid[y, x]) and not blockers), (y, x)
    assert not seen[0].all() and seen[0, 15:22].all()
    assert seen[2].all()


def test_samples_share_no_memory(motorcycle):
    again = load_sample("motorcycle")
    assert torch.equal(again.image_A, motorcycle.image_A)
    again.image_A.zero_()
    assert again.depth_A is not None
    again.depth_A.zero_()
    assert load_sample("motorcycle").image_A.mean() > 0.1 and motorcycle.image_A.mean() > 0.1
    with pytest.raises(AttributeError):
        again.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_unknown_and_missing(monkeypatch, tmp_path):
    with pytest.raises(L2MError, match="motorcycle, astronaut"):
        load_sample("lena")
    with pytest.raises(L2MError):
        load_sample("../astronaut")

    class Spec:
        origin = str(tmp_path / "skimage" / "__init__.py")

    monkeypatch.setattr(samples, "find_spec", lambda _name: Spec)
    with pytest.raises(MissingError, match=r"coffee\.png"):
        load_sample("coffee")
    with pytest.raises(MissingError, match="motorcycle"):
        load_sample("motorcycle")
    monkeypatch.setattr(samples, "find_spec", lambda _name: None)
    with pytest.raises(MissingError, match="pip install scikit-image"):
        load_sample("coffee")
