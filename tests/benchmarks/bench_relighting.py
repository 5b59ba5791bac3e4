"""Relighting a pair of 256x256 views: normals, 2 to 5 lights with shadows, tone."""

from dataclasses import replace

import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.geometry import Camera, intrinsics
from l2m_viz.lifting import RelightCfg, sample_lighting, shade


@pytest.mark.parametrize("num_lights", [2, 5])
def bench_relight_pair(in_units, num_lights):
    """Both views of a pair; one with another light than the other."""
    side = 256
    image = resize_image(load_sample("astronaut").image_A, (side, side))
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(1, 1, 8, 8, generator=generator)
    depth = 1.5 + torch.nn.functional.interpolate(rough, (side, side), mode="bicubic")[0, 0]
    valid = torch.ones(side, side, dtype=torch.bool)
    camera = Camera(intrinsics(0.6 * side, (side, side)), torch.eye(4), side, side)
    cfg = RelightCfg(num_lights=(num_lights, num_lights))
    lightings = [replace(sample_lighting(1.5, cfg, generator), shadows=True) for _ in range(2)]
    marched = 24 * num_lights * side * side  # places read, six operations each
    in_units(
        f"relight both views 256^2, {num_lights} lights",
        lambda: [shade(image, depth, valid, camera, lighting) for lighting in lightings],
        moved=2 * 4 * (marched + side * side * (3 + 3 + 40)),
        flops=2 * marched * 12,
    )
