"""Camera sampling: the official ranges, in units of the scene, and reproducible."""

import math

import pytest
import torch

from l2m_viz.geometry import intrinsics, transform_points
from l2m_viz.lifting import ViewSamplerCfg, lift, orbit_cameras, sample_cameras, sample_intrinsics

HW = (40, 60)


def _scene(unit: float = 1.0):
    depth = torch.linspace(2.0, 4.0, HW[0])[:, None].expand(HW).contiguous() * unit
    return lift(torch.rand(*HW, 3), depth, intrinsics(50.0, HW))


def test_ranges_are_the_official_ones():
    scene = _scene(1000.0)
    cameras = sample_cameras(scene, 200, generator=torch.Generator().manual_seed(0))
    moves = torch.stack([camera.w2c[:3, 3] for camera in cameras]).abs() / scene.unit
    assert 0.2 <= moves[:, :2].min() < 0.22
    assert 0.38 < moves[:, :2].max() <= 0.4
    assert 0.4 <= moves[:, 2].min() < 0.42
    assert 0.78 < moves[:, 2].max() <= 0.8
    cosines = torch.stack([(torch.trace(camera.w2c[:3, :3]) - 1) / 2 for camera in cameras])
    angles = torch.acos(cosines.clamp(-1, 1)) * 180 / math.pi
    assert angles.min() >= math.sqrt(3) * 5 - 1e-3
    assert angles.max() <= math.sqrt(3) * 10 + 1e-3


def test_both_signs_occur():
    cameras = sample_cameras(_scene(), 50, generator=torch.Generator().manual_seed(1))
    signs = torch.stack([camera.w2c[:3, 3] for camera in cameras]).sign().mean(dim=0)
    assert (signs.abs() < 0.6).all()


def test_the_same_generator_gives_the_same_cameras_and_units_cancel():
    first = sample_cameras(_scene(1.0), 3, generator=torch.Generator().manual_seed(2))
    second = sample_cameras(_scene(1000.0), 3, generator=torch.Generator().manual_seed(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.w2c[:3, 3] * 1000, b.w2c[:3, 3])
        assert torch.equal(a.w2c[:3, :3], b.w2c[:3, :3])


def test_a_roll_turns_the_picture_about_its_centre():
    """With nothing else moving, X' = R X is a rotation about z by an angle of the range, either way."""
    still = ViewSamplerCfg(
        shift=(0.0, 0.0), dolly=(0.0, 0.0), rotation_deg=(0.0, 0.0), roll_deg=(30.0, 180.0)
    )
    cameras = sample_cameras(_scene(), 100, still, torch.Generator().manual_seed(4))
    rotations = torch.stack([camera.w2c[:3, :3] for camera in cameras])
    torch.testing.assert_close(
        rotations[:, 2], torch.tensor([0.0, 0.0, 1.0]).expand(100, 3), atol=1e-6, rtol=0
    )
    angles = torch.atan2(rotations[:, 1, 0], rotations[:, 0, 0]) * 180 / math.pi
    assert 30 - 1e-3 <= angles.abs().min() < 40 and 170 < angles.abs().max() <= 180
    assert 0.2 < (angles > 0).float().mean() < 0.8


def test_a_roll_comes_after_the_move_so_the_camera_stays_where_it_is():
    moved = ViewSamplerCfg(roll_deg=(90.0, 90.0))
    generators = (torch.Generator().manual_seed(5) for _ in range(2))
    (plain,), (rolled,) = (
        sample_cameras(_scene(), 1, cfg, g)
        for cfg, g in zip((ViewSamplerCfg(), moved), generators, strict=True)
    )
    torch.testing.assert_close(rolled.center, plain.center, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        rolled.c2w[:3, 2], plain.c2w[:3, 2], atol=1e-5, rtol=0
    )  # and looks the same way


def test_an_orbit_keeps_its_pivot_in_the_middle_at_the_same_distance():
    """With nothing else moving, a point of the first camera's axis within the range of pivots stays where it is."""
    still = ViewSamplerCfg(
        shift=(0.0, 0.0), dolly=(0.0, 0.0), rotation_deg=(0.0, 0.0), orbit_deg=(20.0, 50.0), pivot=(3.0, 3.0)
    )
    scene = _scene(7.0)
    cameras = sample_cameras(scene, 50, still, torch.Generator().manual_seed(6))
    pivot = torch.tensor([0.0, 0.0, 3.0 * scene.unit, 1.0])
    angles = []
    for camera in cameras:
        torch.testing.assert_close(camera.w2c @ pivot, pivot, atol=1e-4 * scene.unit, rtol=0)
        angles.append(math.degrees(math.acos(camera.w2c[2, 2].item())))  # between the two lines of sight
        assert camera.w2c[0, 1] == pytest.approx(
            camera.w2c[1, 0].item(), abs=1e-6
        )  # about no axis but across: no roll
    assert 20 - 1e-3 <= min(angles) < 25 and 45 < max(angles) <= 50 + 1e-3
    centers = torch.stack([camera.center for camera in cameras])
    assert (centers[:, :2] > 0).float().mean(dim=0).sub(0.5).abs().max() < 0.25  # to all sides


def test_an_orbit_comes_before_the_rest_of_the_move():
    """The same draws with an orbit of nothing are those without."""
    (plain,) = sample_cameras(_scene(), 1, ViewSamplerCfg(), torch.Generator().manual_seed(7))
    tiny = ViewSamplerCfg(orbit_deg=(1e-6, 1e-6))
    (orbited,) = sample_cameras(_scene(), 1, tiny, torch.Generator().manual_seed(7))
    torch.testing.assert_close(orbited.w2c, plain.w2c, atol=1e-5, rtol=0)


def test_intrinsics_range():
    generator = torch.Generator().manual_seed(3)
    focals = (
        torch.tensor([sample_intrinsics(HW, generator=generator)[0, 0].item() for _ in range(200)]) / HW[1]
    )
    assert 0.45 <= focals.min() < 0.47
    assert 0.73 < focals.max() <= 0.75


def test_orbit_starts_at_the_photo_and_looks_at_the_scene():
    scene = _scene()
    cameras = orbit_cameras(scene, 8, 0.2)
    torch.testing.assert_close(cameras[0].w2c, torch.eye(4), atol=1e-6, rtol=0)
    middle = torch.tensor([0.0, 0.0, scene.depth.median().item()])
    for camera in cameras:
        assert transform_points(camera.w2c, middle)[:2].abs().max() < 1e-5
        assert camera.center.norm() <= 0.25 * scene.unit
    assert cameras[2].center[0] == pytest.approx(0.2 * scene.unit, rel=1e-4)
