"""Two threads may render at once, whatever numba's threading layer is."""

import os
import subprocess
import sys

import pytest

_CODE = """
import threading, torch, numba
from l2m_viz import Camera, gaussians_from_depth, lift, rasterize
from l2m_viz.geometry import intrinsics

hw = (60, 90)
K = intrinsics(80.0, hw)
image, depth = torch.rand(*hw, 3), 2 + torch.rand(hw)
scene, gaussians = lift(image, depth, K), gaussians_from_depth(image, depth, K)
camera = Camera(K, torch.eye(4), hw[1], hw[0])
expected = rasterize(gaussians, camera).color, scene.render(camera).image
failed = []

def work():
    for _ in range(20):
        same = torch.equal(rasterize(gaussians, camera).color, expected[0])
        same = same and torch.equal(scene.render(camera).image, expected[1])
        failed.extend([] if same else [1])

threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(numba.threading_layer(), len(failed))
"""


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_four_threads_get_the_same_pictures(layer):
    env = {**os.environ, "NUMBA_THREADING_LAYER": layer}
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, env=env, check=False)
    if layer == "omp" and "No threading layer could be loaded" in done.stderr:
        pytest.skip("this numba has no OpenMP layer")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [layer, "0"]
