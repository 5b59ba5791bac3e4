"""The one door to parallel numba kernels.

numba's `workqueue` threading layer aborts the process when two threads enter parallel code at once (a web app does);
`omp` and `tbb` do not. Which layer is in use is known only after the first parallel call, so until then, and with
`workqueue` for ever, calls take turns.
"""

import ctypes
import hashlib
import math
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba

if TYPE_CHECKING:
    import torch

# numba's cache of compiled kernels looks at the date of each kernel's own file only, yet constants and functions of
# other files are frozen into it: a folder for each state of all of them keeps an upgrade from running old code.
_HERE = Path(__file__).parent
_SOURCES = (_HERE / "_simd.py", *sorted(_HERE.glob("*/_[a-z]*.py")), _HERE / "gaussians" / "reference.py")
_STATE = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
_CACHE = Path(__file__).parent / "__pycache__"
if os.access(_CACHE if _CACHE.exists() else _CACHE.parent, os.W_OK) and not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = str(_CACHE / f"numba-{_STATE}")  # pyright: ignore

_TURN = threading.Lock()
_THREAD_SAFE_LAYERS = frozenset({"omp", "tbb"})


def run_kernel(kernel: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401 (whatever the kernel returns)
    """Call a parallel numba kernel; safe from any number of threads."""
    if _layer() in _THREAD_SAFE_LAYERS:
        return kernel(*args)
    with _TURN:
        return kernel(*args)


def is_traced() -> bool:
    """Whether torch's operations are being written down, for export or a compiler: neither sees into a kernel."""
    import torch

    return torch.jit.is_tracing() or torch.compiler.is_compiling()  # pyright: ignore[reportPrivateImportUsage]


def num_threads() -> int:
    """Number of threads a kernel called from here will use."""
    return numba.get_num_threads()


def large_empty(shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
    """A CPU tensor of anything, in large pages where the system has them: numpy asks for them, torch does not.

    The system zeroes fresh memory page by page, which for small pages costs more than what is then done with them.
    """
    import numpy as np
    import torch

    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _LINE, np.uint8)
    first = -memory.ctypes.data % _LINE  # of a cache line: matrix products take a third longer elsewhere
    return torch.from_numpy(memory[first : first + size]).view(dtype).view(shape)


_LINE = 64


def keep_memory() -> None:
    """Let the C library keep what is freed, for the big tensors that come next.

    glibc hands every block of more than 32 MB back to the system, which then zeroes each of its pages again: in
    training and in dense matching on a CPU that takes as long as the work itself. For programs, not for libraries: the
    command line, the app and the trainings call it, never an import.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _layer() -> str | None:
    try:
        return numba.threading_layer()  # pyright: ignore[reportPrivateImportUsage]
    except ValueError:  # nothing parallel has run yet
        return None
