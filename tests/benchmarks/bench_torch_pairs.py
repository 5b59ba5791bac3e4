"""A batch of training pairs of 256x256 px from photos in memory: one by one in numba, and together in plain torch.

The torch path is for GPUs. On a CPU it moves whole vectors through memory where a kernel keeps a triangle in
registers: it is the slower one there, and here to be seen.
"""

import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.geometry import Camera, intrinsics, look_at
from l2m_viz.lifting import lift
from l2m_viz.lifting.torch_mesh import lift_batch, render_batch
from l2m_viz.training import PairCfg, make_pair
from l2m_viz.training.torch_pairs import make_pairs_batch

pytestmark = pytest.mark.usefixtures("unchecked")  # type checks are the tests', not a user's
_HW = (256, 256)
_PIXELS = _HW[0] * _HW[1]
_WAYS = ["numba", "torch on cpu", pytest.param("torch on cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=_WAYS)
def way(request):
    return request.param


def _count(way: str) -> int:
    return 64 if way == "torch on cuda" else 8  # a GPU is idle with few


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("p_relight", [0.0, 1.0])
def bench_pairs(in_units, way, p_relight):
    """Crop, depth, mesh, cameras until they overlap, renders, truth both ways, light of both views."""
    cfg, count, device = PairCfg(hw=_HW, p_relight=p_relight), _count(way), way.removeprefix("torch on ")
    names = ("coffee", "astronaut", "rocket", "chelsea") * (count // 4)
    photos = torch.stack([resize_image(load_sample(name).image_A, (360, 480)) for name in names])
    seeds = torch.arange(count)

    def one_by_one() -> None:
        for photo, seed in zip(photos, seeds.tolist(), strict=True):
            make_pair(photo, cfg, seed=seed)

    def together() -> None:
        make_pairs_batch(there, cfg, seeds=seeds)
        _wait(device)

    there = photos if way == "numba" else photos.to(device)
    moved = count * 2 * 4 * _PIXELS * (2 * 3 + 2 * 2 + 4 + 6 / 4)  # what pairs consist of, written and read
    name = f"{count} pairs 256^2{', relit' * bool(p_relight)}, {way}"
    in_units(name, one_by_one if way == "numba" else together, moved=moved)


def bench_render(in_units, way):
    """Meshes of bumps, the camera moved aside."""
    count, device = _count(way), way.removeprefix("torch on ")
    rough = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    depths = 1.5 + torch.nn.functional.interpolate(rough, _HW, mode="bicubic")[:, 0]
    image, K = resize_image(load_sample("astronaut").image_A, _HW), intrinsics(0.6 * _HW[1], _HW)
    w2c = look_at(torch.tensor([0.3, -0.1, 0.0]), torch.tensor([0.0, 0.0, 2.0]))
    name, moved = f"{count} renders 256^2, {way}", count * 4 * _PIXELS * (3 + 1 + 3 + 1)
    if way == "numba":
        scenes, camera = [lift(image, depth, K) for depth in depths], Camera(K, w2c, _HW[1], _HW[0])
        in_units(name, lambda: [scene.render(camera) for scene in scenes], moved=moved)
        return
    valid = torch.ones_like(depths, dtype=torch.bool)
    fields = image.expand(count, *image.shape), depths, valid, K.expand(count, 3, 3)
    batch, w2cs = lift_batch(*(field.to(device) for field in fields)), w2c.expand(count, 4, 4).to(device)

    def together() -> None:
        render_batch(batch, w2cs)
        _wait(device)

    in_units(name, together, moved=moved)
