"""A training pair of 256x256 px from a JPEG on disk: all between the file and the tensors, on one core."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numba
import pytest
import torch

from l2m_viz.data import load_sample, write_image
from l2m_viz.lifting import RelightCfg, warp_from_depth
from l2m_viz.training import PairCfg, make_pair
from l2m_viz.training.pairs import read_photo

_PIXELS = 256 * 256


@contextmanager
def _one_core() -> Iterator[None]:
    """As a worker of a stream runs; the unit stays one of all cores."""
    threads = torch.get_num_threads(), numba.get_num_threads(), cv2.getNumThreads()
    numba.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)  # last: numba's start sets the OpenMP that both may share to all cores
    yield
    numba.set_num_threads(threads[1])
    cv2.setNumThreads(threads[2])
    torch.set_num_threads(threads[0])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{name}.jpg" for name in ("coffee", "astronaut", "rocket", "chelsea")]
    for path in paths:
        write_image(path, load_sample(path.stem).image_A)
    return paths


@pytest.mark.parametrize("p_relight", [0.0, 1.0])
def bench_pair(in_units, photos, p_relight):
    """Decoding, depth, mesh, render, truth both ways; relighting of both views by 2 to 5 lights with shadows."""
    cfg = PairCfg(p_relight=p_relight, p_relight_apart=1.0, relight=RelightCfg(shadow_probability=1.0))
    turns = zip(itertools.cycle(photos), itertools.count())

    def one_pair() -> None:
        photo, seed = next(turns)
        with _one_core():
            make_pair(read_photo(photo, cfg), cfg, seed=seed)

    moved = 4 * _PIXELS * (2 * 3 + 2 * 2 + 2 + 6 / 4)  # what a pair consists of, written once
    name = "pair 256^2 from disk, one core" + ", both views relit" * bool(p_relight)
    in_units(name, one_pair, moved=2 * moved)


def bench_truth(in_units, photos):
    """Warp and covisibility of one direction."""
    pair = make_pair(read_photo(photos[0]), seed=0)

    def one_way() -> None:
        with _one_core():
            warp_from_depth(
                pair.depth_A, pair.K_A, pair.depth_B, pair.K_B, pair.T_A_to_B, pair.valid_A, pair.valid_B
            )

    in_units(
        "truth 256^2, one way, one core", one_way, moved=_PIXELS * (4 + 1 + 4 + 1 + 8 + 1), flops=_PIXELS * 60
    )
