"""The one door to parallel numba kernels.

numba's `workqueue` threading layer aborts the process when two threads enter parallel code at once (a web app does);
`omp` and `tbb` do not. Which layer is in use is known only after the first parallel call, so until then, and with
`workqueue` for ever, calls take turns.
"""

import threading
from collections.abc import Callable
from typing import Any

import numba

_TURN = threading.Lock()
_THREAD_SAFE_LAYERS = frozenset({"omp", "tbb"})


def run_kernel(kernel: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401 (whatever the kernel returns)
    """Call a parallel numba kernel; safe from any number of threads."""
    if _layer() in _THREAD_SAFE_LAYERS:
        return kernel(*args)
    with _TURN:
        return kernel(*args)


def num_threads() -> int:
    """Number of threads a kernel called from here will use."""
    return numba.get_num_threads()


def _layer() -> str | None:
    try:
        return numba.threading_layer()  # pyright: ignore[reportPrivateImportUsage]
    except ValueError:  # nothing parallel has run yet
        return None
