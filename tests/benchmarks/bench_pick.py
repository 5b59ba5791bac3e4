"""Picking one point of a scene of a million Gaussians, 1000 x 1000 px: the time between a click and its answer."""

import pytest
import torch

from l2m_viz.gaussians import Gaussians, feature_similarity, gaussians_from_depth, pick
from l2m_viz.geometry import Camera, intrinsics

_SIDE = 1000


@pytest.fixture(scope="module")
def scene() -> tuple[Gaussians, Camera]:
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(1, 1, 8, 8, generator=generator)
    depth = 2 + torch.nn.functional.interpolate(rough, (_SIDE, _SIDE), mode="bicubic")[0, 0]
    image, features = (torch.rand(_SIDE, _SIDE, num, generator=generator) for num in (3, 32))
    K = intrinsics(float(_SIDE), (_SIDE, _SIDE))
    return gaussians_from_depth(image, depth, K, features), Camera(K, torch.eye(4), _SIDE, _SIDE)


def bench_pick(in_units, scene):
    """The cheap bound over all Gaussians, the exact test of a few."""
    gaussians, camera = scene
    in_units("pick 10^6", lambda: pick(gaussians, camera, (400.3, 500.5)), moved=4 * 6 * len(gaussians))


def bench_similarity(in_units, scene):
    """Cosine of one descriptor to all, 32 channels."""
    gaussians, _ = scene
    query = torch.ones(32)
    moved = 4 * 32 * len(gaussians)
    in_units("similarity 10^6 x 32", lambda: feature_similarity(gaussians, query), moved=moved)
