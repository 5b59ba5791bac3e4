"""The splatter at the sizes of a lifted photo: 512x512 px, 262,144 Gaussians, 3 colour and 32 feature channels."""

import time

import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.gaussians import FeatureView, Gaussians, gaussians_from_depth, lift_features, rasterize
from l2m_viz.geometry import Camera, intrinsics
from l2m_viz.lifting import Depth, lift


def _scene(side: int, num_features: int) -> tuple[Gaussians, Camera]:
    image = resize_image(load_sample("astronaut").image_A, (side, side))
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(1, 1, 8, 8, generator=generator)
    depth = 2 + torch.nn.functional.interpolate(rough, (side, side), mode="bicubic")[0, 0]
    features = torch.randn(side, side, num_features, generator=generator) if num_features else None
    K = intrinsics(float(side), (side, side))
    pose = torch.eye(4)
    pose[0, 3] = -0.1 * 2.5  # a tenth of the focal length, in units of the middle depth
    return gaussians_from_depth(image, depth, K, features), Camera(K, pose, side, side)


# The last two have one and four million Gaussians: the cost is linear in their number.
@pytest.mark.parametrize(("side", "num_features"), [(512, 32), (512, 0), (256, 0), (1024, 0), (2048, 0)])
def bench_forward(in_units, side, num_features):
    """Projection, ordering and compositing."""
    gaussians, camera = _scene(side, num_features)
    n, channels = len(gaussians), 3 + num_features
    moved = 4 * (n * (11 + channels) + side * side * (channels + 2))
    flops = 2 * n * 9 * (channels + 1)  # about nine pixels over 1/255 each
    in_units(
        f"forward {side}^2, {num_features} features",
        lambda: rasterize(gaussians, camera),
        moved=moved,
        flops=flops,
    )


def bench_forward_and_backward(in_units):
    """Both passes, gradients to every parameter."""
    gaussians, camera = _scene(512, 32)
    names = ("means", "quats", "log_scales", "logit_opacities", "colors", "features")
    leaves = [getattr(gaussians, name).clone().requires_grad_() for name in names]
    n, pixels, channels = len(gaussians), 512 * 512, 35
    moved = 4 * (3 * n * (11 + channels) + 3 * pixels * (channels + 2))

    def step():
        render = rasterize(Gaussians(*leaves), camera)
        loss = render.color.sum() + render.features.sum() + render.alpha.sum() + render.depth.sum()
        return torch.autograd.grad(loss, leaves)

    in_units(
        "forward and backward 512^2, 32 features", step, moved=moved, flops=3 * 2 * n * 9 * (channels + 1)
    )


def bench_closed_form_lifting(in_units):
    """A map of 64 channels onto 262,144 Gaussians from each of 8 views."""
    gaussians, camera = _scene(512, 0)
    cells = torch.randn(128, 128, 64, generator=torch.Generator().manual_seed(0))
    views = []
    for x in torch.linspace(-0.1, 0.1, 8):
        pose = torch.eye(4)
        pose[0, 3] = 2.5 * x
        views.append(FeatureView(Camera(camera.K, pose, 512, 512), cells))
    n, pixels = len(gaussians), 512 * 512
    in_units(
        "closed-form lifting, 8 views of 64 channels",
        lambda: lift_features(gaussians, views),
        moved=4 * (8 * (n * (14 + 64) + pixels) + 2 * n * 64),
        flops=8 * 2 * n * 9 * 65,
    )


def bench_mesh_render(in_units):
    """522,000 triangles through the z-buffer."""
    image = resize_image(load_sample("astronaut").image_A, (512, 512))
    generator = torch.Generator().manual_seed(0)
    depth = 2 + torch.nn.functional.interpolate(
        torch.rand(1, 1, 8, 8, generator=generator), (512, 512), mode="bicubic"
    )
    K = intrinsics(512.0, (512, 512))
    scene = lift(image, Depth(depth[0, 0], torch.ones(512, 512, dtype=torch.bool), "relative", "random"), K)
    pose = torch.eye(4)
    pose[0, 3] = -0.25
    camera = Camera(K, pose, 512, 512)
    in_units("mesh render 512^2", lambda: scene.render(camera), moved=4 * 512 * 512 * (7 + 5))


@pytest.mark.gpu
@pytest.mark.parametrize("num_features", [3, 32, 64, 128, 384])
def bench_on_a_gpu(benchmark, capsys, num_features):
    """Frames and training iterations (gradients to every parameter) a second of the gsplat backend, 512x512 px."""
    gaussians, camera = _scene(512, num_features)
    gaussians = gaussians.to("cuda")
    names = ("means", "quats", "log_scales", "logit_opacities", "colors", "features")
    leaves = [getattr(gaussians, name).clone().requires_grad_() for name in names]

    def frame() -> None:
        rasterize(gaussians, camera, backend="gsplat")
        torch.cuda.synchronize()

    def iteration() -> None:
        render = rasterize(Gaussians(*leaves), camera, backend="gsplat")
        loss = render.color.sum() + render.features.sum() + render.alpha.sum() + render.depth.sum()
        torch.autograd.grad(loss, leaves)
        torch.cuda.synchronize()

    numbers = {}
    for name, work in (("frames", frame), ("iterations", iteration)):
        work()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(20):
            work()
        numbers[f"{name} a second"] = 20 / (time.perf_counter() - start)
        numbers[f"GB of {name}"] = torch.cuda.max_memory_allocated() / 1e9
    benchmark.pedantic(frame, rounds=20)
    benchmark.extra_info |= numbers
    with capsys.disabled():
        told = ", ".join(f"{value:.3g} {name}" for name, value in numbers.items())
        print(f"\ngsplat, 512^2, 262,144 Gaussians, {num_features} features: {told}", end="")
