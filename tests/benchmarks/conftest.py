"""Speed in units of one float32 1024^3 matrix product on the same threads, so that machines compare.

The unit is measured before and after each benchmark; when the two differ by more than 15 % the machine was busy, and
the benchmark fails instead of reporting. The floor is what the bytes and operations would cost at the measured copy
bandwidth and matrix rate. What is measured runs as a user runs it: without the type checks of the tests, which would
double the time of what calls many small functions.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

# The tests let waiting threads sleep, which suits a busy machine. On an idle one, as a user's is and as a benchmark
# needs it, they are awake when the next kernel comes: waking takes half as long as a small render.
os.environ.pop("OMP_WAIT_POLICY", None)

import pytest
import torch

# pyproject's options have installed jaxtyping's hook by now, and nothing of ours is imported yet.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "jaxtyping._import_hook"]

_MAX_DRIFT = 0.15
_lines: list[str] = []


def _seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _unit() -> float:
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    return _seconds(lambda: torch.mm(a, b), 30)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes moved (read and written) per second by a large copy."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), 5)


@pytest.fixture
def in_units(benchmark, copy_bandwidth):
    """Run a benchmark and report it in units; ``moved`` bytes and ``flops`` give the floor."""

    def run(name: str, work: Callable[[], object], *, moved: float = 0, flops: float = 0) -> float:
        before = _unit()
        benchmark.pedantic(work, warmup_rounds=2, rounds=15)
        after = _unit()
        drift = abs(after / before - 1)
        load = os.getloadavg()[0]
        if drift > _MAX_DRIFT:
            pytest.fail(
                f"{name}: the unit moved by {drift:.0%} (load {load:.1f}); the machine is busy, no report"
            )
        unit = (before + after) / 2
        units = benchmark.stats.stats.median / unit
        floor = max(moved / copy_bandwidth, flops / (2 * 1024**3 / unit)) / unit
        distance = f", floor {floor:.2f} units, {units / floor:.1f} times the floor" if floor else ""
        benchmark.extra_info |= {"units": units, "unit_ms": unit * 1e3, "floor_units": floor, "load": load}
        _lines.append(f"{name}: {units:.2f} units (unit {unit * 1e3:.1f} ms, load {load:.1f}){distance}")
        return units

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the ratios under pytest-benchmark's own table."""
    for line in _lines:
        terminalreporter.write_line(line)
