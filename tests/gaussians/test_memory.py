"""Peak memory of the CPU backend, measured by the kernel in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2m_viz.gaussians import rasterize

PROGRAM = """
import re, sys
from pathlib import Path
import torch
from l2m_viz.gaussians import Gaussians, rasterize
from l2m_viz.geometry import Camera, intrinsics

def scene(h, w, d):
    K, n = intrinsics(float(w), (h, w)), h * w
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    means = torch.stack([(x - w / 2) / w * 2, (y - h / 2) / w * 2, torch.full_like(x, 2.0)], dim=-1).reshape(n, 3)
    leaves = [means, torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1), torch.full((n, 3), -7.5), torch.full((n,), 3.0),
              torch.rand(n, 3), torch.rand(n, d)]
    return [leaf.requires_grad_(sys.argv[1] == "backward") for leaf in leaves], Camera(K, torch.eye(4), w, h)

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def work(leaves, camera):
    render = rasterize(Gaussians(*leaves), camera)
    outputs = [render.color, render.features, render.depth, render.alpha]
    if sys.argv[1] == "backward":
        pull = [torch.ones_like(value) for value in outputs]
        return outputs + pull + list(torch.autograd.grad(outputs, leaves, pull))
    return outputs

work(*scene(32, 48, 32))  # compiles
leaves, camera = scene(640, 768, 32)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
results = work(leaves, camera)
peak = status("VmHWM") - before
size = sum(value.nbytes for value in [*leaves, *results])
print((peak + sum(leaf.nbytes for leaf in leaves)) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_peak_memory_is_at_most_two_and_a_half_times_inputs_and_outputs(mode):
    shown = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert 0.9 < float(shown.stdout) <= 2.5


def test_a_feature_image_gets_the_memory_of_the_last_only_when_nobody_holds_that(hard_scene, camera_at):
    scene, camera = hard_scene(0, num_features=5), camera_at()
    first = rasterize(scene, camera, backend="cpu").features
    kept, place = first.clone(), first.data_ptr()
    second = rasterize(scene.select(torch.arange(200)), camera, backend="cpu").features  # another picture
    assert second.data_ptr() != place
    assert torch.equal(first, kept)
    shared = first[3:].numpy()  # outlives the tensor that it is a part of
    del first
    third = rasterize(scene.select(torch.arange(100)), camera, backend="cpu").features
    assert third.data_ptr() != place
    assert (shared == kept[3:].numpy()).all()
    del shared
    fourth = rasterize(scene, camera, backend="cpu").features
    assert fourth.data_ptr() == place
    assert torch.equal(fourth, kept)
