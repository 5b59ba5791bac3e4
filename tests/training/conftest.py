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
