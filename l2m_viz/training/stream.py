"""Training pairs without end: a folder of photos in, batches of pairs out, made by any number of processes.

Pair i is a function of the folder, the settings, the stream's seed and i alone: workers change how fast pairs come,
never which. So a run can be resumed at any pair, and any pair can be made again by its number. The photos are shuffled
anew for every pass over the folder; a photo that cannot be used hands its place to the next one.
"""

import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import cv2
import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from l2m_viz.errors import ImageError, L2MError
from l2m_viz.parallel import keep_memory
from l2m_viz.training.pairs import NoPairError, Pair, PairCfg, Range, make_pair, read_photo

PHOTO_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MAX_WITHOUT_PAIR = 10  # photos in a row that allow no pair; then the settings are to blame
_STACKED = (
    "image_A", "image_B", "depth_A", "depth_B", "valid_A", "valid_B", "hole_mask_B", "inpainted_mask_B",
    "warp_A_to_B", "covisibility_A_to_B", "warp_B_to_A", "covisibility_B_to_A", "K_A", "K_B", "T_A_to_B",
)  # fmt: skip
_ALIGNMENT = 64  # bytes
# What the draws for pair i are for; each purpose has random numbers of its own.
_ORDER, _PAIR, _DIFFICULTY = range(3)


@dataclass(frozen=True)
class PairBatch:
    """Pairs stacked along a leading axis; the fields are those of `Pair`.

    Attributes:
        seeds: `Pair.seed` of each.
        difficulties: `PairCfg.difficulty` of each.
        photos: The photo that each was made from, relative to the folder.
        backgrounds: The photo behind the holes of each, if there is one.
        index: Number of the first pair in the stream.
    """

    image_A: Float[Tensor, "b h w 3"]
    image_B: Float[Tensor, "b h w 3"]
    depth_A: Float[Tensor, "b h w"]
    depth_B: Float[Tensor, "b h w"]
    valid_A: Bool[Tensor, "b h w"]
    valid_B: Bool[Tensor, "b h w"]
    hole_mask_B: Bool[Tensor, "b h w"]
    inpainted_mask_B: Bool[Tensor, "b h w"]
    warp_A_to_B: Float[Tensor, "b h w 2"]
    covisibility_A_to_B: Bool[Tensor, "b h w"]
    warp_B_to_A: Float[Tensor, "b h w 2"]
    covisibility_B_to_A: Bool[Tensor, "b h w"]
    K_A: Float[Tensor, "b 3 3"]
    K_B: Float[Tensor, "b 3 3"]
    T_A_to_B: Float[Tensor, "b 4 4"]
    seeds: Int64[Tensor, " b"]
    difficulties: Float64[Tensor, " b"]
    photos: tuple[str, ...]
    backgrounds: tuple[str | None, ...]
    index: int

    @property
    def next_index(self) -> int:
        """Where a stream (without a ``stride``) has to start to go on behind this batch."""
        return self.index + len(self.photos)

    def to(self, device: torch.device | str) -> "PairBatch":
        """The batch with all that is as large as an image on a device; seeds and difficulties stay on the CPU."""
        if torch.device(device) == self.image_A.device:
            return self
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _STACKED})


@dataclass(frozen=True)
class StreamedPair:
    """One pair of a stream and what it was made from."""

    pair: Pair
    index: int
    difficulty: float
    photo: str
    background: str | None


class PairStream:
    """An iterable of batches of training pairs, from all photos under a folder.

    Each ``iter`` starts anew at pair ``start`` and makes ``length`` batches, or goes on for ever. Photos that cannot be
    read, or allow no pair, are skipped with one warning each and listed in ``skipped``.

    Args:
        folder: Photos, in subfolders too; read in sorted order, other files are ignored.
        cfg: How a photo becomes a pair. Holes of "background" show another photo of the folder.
        batch_size: Pairs in a batch.
        seed: Of the whole stream.
        num_workers: Processes that make batches ahead; 0 makes them in this one. Scripts that use any need the usual
            ``if __name__ == "__main__":``.
        start: Number of the first pair; `PairBatch.next_index` of the last batch to resume.
        length: Number of batches, or None for no end.
        stride: From the first pair of a batch to that of the next; None: ``batch_size``, so that no pair is left out.
            One of several processes that share batches of B pairs has ``batch_size`` B / n and ``stride`` B.
        difficulty: The curriculum in place of ``cfg.difficulty``: a function of the pair's number, or a range to draw
            from.
        finish: Done to each batch by the process that made it; a function that can be pickled.

    Raises:
        ImageError: no such folder, or no photo in it. While iterating: none of them can be read.
        L2MError: a number is out of its range. While iterating: the settings allow no pair, or a worker died.
    """

    def __init__(  # noqa: PLR0913 (all but the first two are options, by name)
        self,
        folder: str | Path,
        cfg: PairCfg | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        start: int = 0,
        length: int | None = None,
        stride: int | None = None,
        difficulty: Callable[[int], float] | Range | None = None,
        finish: Callable[[PairBatch], PairBatch] | None = None,
    ) -> None:
        lowest = {"batch_size": (batch_size, 1), "seed": (seed, 0), "num_workers": (num_workers, 0)}
        lowest |= {"start": (start, 0), "length": (length or 0, 0)}
        lowest |= {"stride": (batch_size if stride is None else stride, batch_size)}
        for name, (value, low) in lowest.items():
            if value < low:
                raise L2MError(f"PairStream {name}", expected=f"at least {low}", got=str(value))
        if isinstance(difficulty, tuple) and not 0 <= difficulty[0] <= difficulty[1] < math.inf:
            expected, got = "0 <= lowest <= highest", f"{difficulty[0]:g} to {difficulty[1]:g}"
            raise L2MError("PairStream difficulty", expected=expected, got=got)
        self.cfg, self.batch_size, self.seed, self.start = cfg or PairCfg(), batch_size, seed, start
        self.num_workers, self.length = num_workers, length
        self.difficulty: Callable[[int], float] | Range | None = difficulty
        self.stride, self.finish = stride or batch_size, finish
        self.skipped: dict[str, str] = {}
        self._maker = _PairMaker(Path(folder), self.cfg, seed)

    @property
    def photos(self) -> tuple[str, ...]:
        """All photos of the folder, relative to it, sorted."""
        return self._maker.photos

    def pair(self, index: int) -> StreamedPair:
        """Make one pair by its number, in this process: the one that a batch of this stream would hold."""
        made, skipped = self._maker.make(index, self._difficulty(index))
        self._warn(skipped)
        return made

    def __iter__(self) -> Iterator[PairBatch]:
        """Make batches until ``length``."""
        loader = DataLoader(
            _Batches(self._maker, self.finish),
            batch_size=None,
            sampler=_Orders(self),
            num_workers=self.num_workers,
            collate_fn=_as_is,
            multiprocessing_context=_context() if self.num_workers else None,
            worker_init_fn=use_one_thread,
            generator=torch.Generator(),  # the loader draws a number; not from the user's generator
        )
        try:
            for made in loader:
                self._warn(made.skipped)
                if made.error is not None:
                    raise made.error
                assert made.batch is not None
                yield made.batch
        except (RuntimeError, OSError, EOFError) as error:
            # Killed while it hands a batch over, a worker breaks the connection before the loader notices its end.
            handing_over = self.num_workers and isinstance(
                error, ConnectionError | EOFError | FileNotFoundError
            )
            its_own = "in DataLoader worker process" in str(error)  # what went wrong in a worker that is well
            if its_own or not (handing_over or "DataLoader worker (pid" in str(error)):
                raise
            todo = (
                "most often memory ran out: take fewer workers or smaller batches, and resume with start; "
                'a script must do its work below `if __name__ == "__main__":`, for workers import it'
            )
            raise L2MError("PairStream: a worker process ended", got=str(error).strip(), todo=todo) from error

    def _difficulty(self, index: int) -> float:
        if self.difficulty is None:
            return self.cfg.difficulty
        if callable(self.difficulty):
            return float(self.difficulty(index))
        return float(_rng(self.seed, _DIFFICULTY, index).uniform(*self.difficulty))

    def _warn(self, skipped: dict[str, str]) -> None:
        for photo, reason in skipped.items():
            if photo not in self.skipped:
                self.skipped[photo] = reason
                number = f"number {len(self.skipped)} of {len(self.photos)} photos"
                warnings.warn(f"PairStream skips {photo} ({number}): {reason}", stacklevel=3)


@dataclass(frozen=True)
class _Order:
    """Which pairs a batch holds. Difficulties are decided by the parent: any function will do, it does not travel."""

    index: int
    difficulties: tuple[float, ...]


@dataclass(frozen=True)
class _Made:
    """What comes back. Errors come as values: raised in a worker they would lose their type and gain its traceback."""

    batch: PairBatch | None
    skipped: dict[str, str]
    error: L2MError | None


class _Orders:
    """The order of every batch; what a loader calls a sampler."""

    def __init__(self, stream: PairStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[_Order]:
        stream, index, left = self._stream, self._stream.start, self._stream.length
        while left is None or left > 0:
            numbers = range(index, index + stream.batch_size)
            yield _Order(index, tuple(stream._difficulty(i) for i in numbers))
            index, left = index + stream.stride, None if left is None else left - 1


class _PairMaker:
    """Makes pair number i; plain data, so that it travels to the workers."""

    def __init__(self, folder: Path, cfg: PairCfg, seed: int) -> None:
        self.folder, self.cfg, self.seed = folder, cfg, seed
        self.photos = list_photos(folder)
        if cfg.holes == "background" and len(self.photos) < 2:
            todo = 'add photos or choose holes="telea"'
            what = f'PairStream: holes="background" in {folder}'
            raise L2MError(what, expected="at least 2 photos", got=str(len(self.photos)), todo=todo)
        self._pass: tuple[int, np.ndarray] | None = None  # number and order of the pass last looked at

    def make(self, index: int, difficulty: float) -> tuple[StreamedPair, dict[str, str]]:
        """Return the pair, and the photos that could not be used on the way to it, with the reasons."""
        rng = _rng(self.seed, _PAIR, index)
        seed, step = int(rng.integers(2**62)), int(rng.integers(1, max(2, len(self.photos))))
        cfg, skipped = replace(self.cfg, difficulty=difficulty), {}
        failure, failures = None, 0
        for photo in self._photos_from(index):
            image = self._read(photo, skipped)
            if image is None:
                continue
            background, behind = self._background(photo, step, skipped)
            try:
                pair = make_pair(image, cfg, seed=seed, background=behind)
            except NoPairError as error:
                failure, failures, skipped[photo] = error, failures + 1, str(error)
                if failures == _MAX_WITHOUT_PAIR:
                    break
                continue
            return StreamedPair(pair, index, difficulty, photo, background), skipped
        if failure is not None:
            raise failure
        photo, reason = next(iter(skipped.items()))
        got = f"{len(skipped)} that are not, among them {photo} ({reason})"
        raise ImageError(f"photos in {self.folder}", expected="a readable one", got=got)

    def _photos_from(self, index: int) -> Iterator[str]:
        """The photo whose turn it is, then all others in the order of this pass."""
        number, place = divmod(index, len(self.photos))
        if self._pass is None or self._pass[0] != number:
            self._pass = number, _rng(self.seed, _ORDER, number).permutation(len(self.photos))
        order = self._pass[1]
        return (self.photos[order[(place + k) % len(order)]] for k in range(len(order)))

    def _background(self, photo: str, step: int, skipped: dict[str, str]) -> tuple[str | None, Tensor | None]:
        """Another photo that can be read, ``step`` places further, and its picture."""
        if self.cfg.holes != "background":
            return None, None
        here, count = self.photos.index(photo), len(self.photos)
        for k in range(count):
            other = self.photos[(here + step + k) % count]
            image = None if other == photo else self._read(other, skipped)
            if image is not None:
                return other, image
        raise ImageError(f"photos in {self.folder}", expected="a second readable one", got=f"only {photo}")

    def _read(self, photo: str, skipped: dict[str, str]) -> Tensor | None:
        try:
            return read_photo(self.folder / photo, self.cfg)
        except ImageError as error:
            skipped[photo] = str(error)
            return None


class _Batches(Dataset[_Made]):
    """Fills orders."""

    def __init__(self, maker: _PairMaker, finish: Callable[[PairBatch], PairBatch] | None) -> None:
        self._maker, self._finish = maker, finish

    def __getitem__(self, order: _Order) -> _Made:
        skipped: dict[str, str] = {}
        pairs = []
        try:
            for offset, difficulty in enumerate(order.difficulties):
                pair, unusable = self._maker.make(order.index + offset, difficulty)
                skipped |= unusable
                pairs.append(pair)
            batch = _stack(pairs)
            if self._finish is not None:
                batch = _in_one_block(self._finish(batch))
        except L2MError as error:
            return _Made(None, skipped, error)
        return _Made(batch, skipped, None)


def _stack(made: list[StreamedPair]) -> PairBatch:
    parts = {name: [getattr(one.pair, name) for one in made] for name in _STACKED}
    parts["seeds"] = [torch.tensor(one.pair.seed) for one in made]
    parts["difficulties"] = [torch.tensor(one.difficulty, dtype=torch.float64) for one in made]
    return PairBatch(
        **_stack_in_one_block(parts),
        photos=tuple(one.photo for one in made),
        backgrounds=tuple(one.background for one in made),
        index=made[0].index,
    )


def _in_one_block(batch: PairBatch) -> PairBatch:
    """A batch whose fields have come to lie here and there, in one block of memory again."""
    parts = {name: [values] for name, values in vars(batch).items() if isinstance(values, Tensor)}
    stacked = _stack_in_one_block(parts)
    return replace(batch, **{name: values[0] for name, values in stacked.items()})


def _stack_in_one_block(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Do what `torch.stack` does for each, in one block of memory.

    Each block that comes from a worker costs its receiver an open file, of which many systems allow 1024.
    """
    sizes = {name: len(each) * each[0].nbytes for name, each in parts.items()}
    starts = np.cumsum([0] + [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()]).tolist()
    block = torch.empty(starts[-1], dtype=torch.uint8)
    stacked = {}
    for start, (name, each) in zip(starts, parts.items(), strict=False):
        values = block[start : start + sizes[name]].view(each[0].dtype).view(len(each), *each[0].shape)
        stacked[name] = torch.stack(each, out=values)
    return stacked


def _context() -> BaseContext:
    """How workers start: never as a fork of this process, whose OpenMP threads would not come along.

    The fork server has only imported this module; its forks start in no time and share its memory.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_is(made: Any) -> Any:  # noqa: ANN401 (the loader's type says a list of samples)
    return made


def use_one_thread(worker: int) -> None:
    """Workers share the machine: each has one core. They make large tensors all the time, in memory that they keep."""
    del worker
    keep_memory()
    numba.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)  # last: numba's start sets the OpenMP that both may share to all cores


def list_photos(folder: Path) -> tuple[str, ...]:
    """All photos under a folder, relative to it, sorted.

    Raises:
        ImageError: no such folder, or no photo in it.
    """
    if not folder.is_dir():
        raise ImageError(f"no such folder {folder}", todo="name a folder of photos")
    found = []
    for parent, folders, files in os.walk(folder):  # links to folders are not followed: they may form a ring
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [n for n in files if n.lower().endswith(PHOTO_SUFFIXES) and not n.startswith(".")]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in names]
    if not found:
        expected = "files in " + ", ".join(PHOTO_SUFFIXES)
        raise ImageError(f"no photo in {folder}", expected=expected, got="none", todo="check the folder")
    return tuple(sorted(found))


def _rng(seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, index])
