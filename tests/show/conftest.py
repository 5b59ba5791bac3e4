"""A sphere before a plane, as the viewer's tests see it. (Imports wait: see tests/conftest.py.)"""

import pytest
import torch

HW = (48, 64)


@pytest.fixture(scope="session")
def camera():
    """A camera of 64 x 48 px at the origin."""
    from l2m_viz.geometry import Camera, intrinsics

    return Camera(intrinsics(60.0, HW), torch.eye(4), width=HW[1], height=HW[0])


@pytest.fixture(scope="session")
def gaussians(camera):
    """One Gaussian a pixel, with four feature channels."""
    from l2m_viz.gaussians import gaussians_from_depth
    from l2m_viz.geometry.scenes import sphere_on_plane

    scene = sphere_on_plane()
    features = torch.rand(*HW, 4, generator=torch.Generator().manual_seed(0))
    return gaussians_from_depth(scene.image(camera), scene.depth(camera)[0], camera.K, features)
