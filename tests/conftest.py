"""What every test process needs before anything else is imported.

Never import l2m_viz here at the top level: jaxtyping's hook instruments modules when they are first imported, and a
module that is already there stays unchecked.
"""

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # no window, no display needed
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # tests talk to nobody
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in the Makefile
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import multiprocessing.util
import signal
import tempfile

import pytest

# A shell has what it starts in the background ignore Ctrl-C, and their children too; some tests send it to theirs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# As many processes as cores: torch's threads would wait for each other. Our own kernels keep theirs, for tests see only
# then what one thread does to another; numba starts first, because its start sets the OpenMP that both may share.
if "PYTEST_XDIST_WORKER" in os.environ:
    import numba
    import torch

    numba.set_num_threads(numba.get_num_threads())
    torch.set_num_threads(1)


def pytest_runtest_setup(item):
    """`-m gpu` on a machine without one skips, and says why."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU in this machine")


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory):
    """A temporary folder that goes when the tests end: gradio, Chromium and others leave files in theirs."""
    tmp_path_factory.getbasetemp()  # pytest's own stays where it is, and keeps what failed
    multiprocessing.util.get_temp_dir()  # removed by its owner, but only when the process ends: not inside of ours
    with (
        tempfile.TemporaryDirectory(prefix="l2m_tests_", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture
def unchecked():
    """Switch jaxtyping's shape checks off, as in a user's process: our own error messages are what is tested."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def golden():
    """Outputs of the official network's modules by name: arrays in.*, w.*, out.*."""
    from pathlib import Path

    import numpy as np

    folder = Path(__file__).parents[2] / "shared" / "reference" / "golden"

    def read(name: str) -> dict[str, np.ndarray]:
        if not (path := folder / f"{name}.npz").is_file():
            pytest.skip(f"the official network's outputs are not here: {path}")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    return read
