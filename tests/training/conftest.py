"""What trainings are tested on: a folder of photos, and two processes. (Imports wait: see tests/conftest.py.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with two small photos, for all tests of a session: nothing may be written into it."""
    from l2m_viz.data import load_sample, write_image

    folder = tmp_path_factory.mktemp("photos")
    for name in ("motorcycle", "coffee"):
        write_image(folder / f"{name}.png", load_sample(name).image_A[:200, :260])
    return folder


@pytest.fixture(scope="session")
def make_batch():
    """Make a batch of pairs of 48x64 px, one from each seed, stacked as the stream's are."""
    import torch

    from l2m_viz.data import load_sample
    from l2m_viz.training.pairs import PairCfg, make_pair
    from l2m_viz.training.stream import PairBatch

    photo = load_sample("motorcycle").image_A[:200, :260]
    apart = {"seeds", "difficulties", "photos", "backgrounds", "index"}

    def make(count: int = 6) -> PairBatch:
        pairs = [make_pair(photo, PairCfg(hw=(48, 64)), seed=seed) for seed in range(count)]
        names = PairBatch.__annotations__.keys() - apart
        return PairBatch(
            **{name: torch.stack([getattr(pair, name) for pair in pairs]) for name in names},
            seeds=torch.arange(count),
            difficulties=torch.ones(count, dtype=torch.float64),
            photos=("photo",) * count,
            backgrounds=(None,) * count,
            index=0,
        )

    return make


@pytest.fixture
def in_two_processes(tmp_path):
    """Run a script, which may import from `tests`, by two processes on this CPU; return what they print.

    torchrun starts them, as `accelerate launch` does on several GPUs.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--log-dir", str(tmp_path / "logs")]  # otherwise it leaves a folder in /tmp
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(found)}

    def run(script: str, *arguments: object) -> str:
        file = tmp_path / "script.py"
        file.write_text(script)
        command = [*launcher, str(file), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
