"""Random scenes that hold every corner case. (Imports wait: see tests/conftest.py.)"""

import pytest
import torch

HW = (37, 53)


@pytest.fixture(scope="session")
def camera_at():
    """Make a camera of 53 x 37 px at ``eye`` that looks at (0, 0, 4)."""
    from l2m_viz.geometry import Camera, intrinsics, look_at

    def make(*eye: float, hw=HW):
        w2c = look_at(torch.tensor(eye or (0.0, 0.0, 0.0)), torch.tensor([0.0, 0.0, 4.0]))
        return Camera(intrinsics(48.0, hw), w2c, width=hw[1], height=hw[0])

    return make


@pytest.fixture(scope="session")
def hard_scene():
    """Make a scene of Gaussians that lie behind, beside, at the near plane and tied in depth, tiny, huge and opaque."""
    from l2m_viz.gaussians import Gaussians

    def make(seed: int, n: int = 300, num_features: int = 7, num_rest: int = 0):
        generator = torch.Generator().manual_seed(seed)
        spread, middle = torch.tensor([2.0, 1.5, 1.5]), torch.tensor([0.0, 0.0, 3.0])
        means = torch.randn(n, 3, generator=generator) * spread + middle
        scales = torch.exp(torch.randn(n, 3, generator=generator) * 1.3 - 3)
        opacities = torch.rand(n, generator=generator)
        means[:20, 2] = 3.0  # ties
        means[20:30, 2] = -1.0  # behind
        means[30:35, 2] = 0.02  # just past the near plane
        scales[40:45], scales[45:50] = 30.0, 1e-5
        opacities[50:70], opacities[70:75] = 1.0, 0.003
        return Gaussians(
            means,
            torch.randn(n, 4, generator=generator),
            scales.log(),
            opacities.clamp(1e-6, 1 - 1e-6).logit(),
            torch.rand(n, 3, generator=generator),
            torch.randn(n, num_features, generator=generator) if num_features else None,
            torch.randn(n, num_rest, 3, generator=generator) / 4 if num_rest else None,
        )

    return make
