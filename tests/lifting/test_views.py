"""Camera sampling: the official ranges, in units of the scene, and reproducible."""

import math

import pytest
import torch

from l2m_viz.geometry import intrinsics, transform_points
from l2m_viz.lifting import lift, orbit_cameras, sample_cameras, sample_intrinsics

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
