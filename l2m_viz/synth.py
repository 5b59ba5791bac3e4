"""`l2m synth`: a folder of photos becomes a folder of shards, however often the work is interrupted.

A shard appears when it is whole, then the index that names it; both by renaming, so a process that is killed loses the
shard in work and nothing else. Pair i depends on the photos, the settings and i alone, so that a run that goes on later
ends with the same bytes as one that was never stopped, and a damaged shard can be made again.
"""

import fcntl
import hashlib
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from l2m_viz import __version__
from l2m_viz.data import remove_file
from l2m_viz.errors import FileFormatError, ImageError, L2MError
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.shards import (
    INDEX_NAME,
    PairRecord,
    ShardIndex,
    encode_pair,
    shard_damage,
    shard_name,
    write_shard,
)
from l2m_viz.training.stream import PairStream, StreamedPair, use_one_thread

Progress = Callable[[int, str], None]
"""Called with the number of pairs that are there, and with a message or nothing."""

_LOCK_NAME = ".lock"


@dataclass(frozen=True)
class SynthCfg:
    """Settings of `synthesise`."""

    # Number of pairs; a finished folder grows when it is asked for more.
    num: int
    # Pairs in a shard.
    shard_size: int = 256
    # Of the whole set.
    seed: int = 0
    # Processes that make pairs; 0 makes them in this one.
    workers: int = 0
    # Compare the shards that are there with their hashes, and make damaged ones again.
    verify: bool = False
    # Range that each pair's difficulty is drawn from, in place of the fixed one of the pair's settings.
    difficulty: tuple[float, float] | None = None
    # How a photo becomes a pair.
    pair: PairCfg = field(default_factory=PairCfg)


@dataclass(frozen=True)
class SynthResult:
    """What a run did.

    Attributes:
        num_made: Pairs made.
        num_kept: Pairs that were there already.
        damaged: Shards that were made again, and what was wrong with them.
        skipped: Photos that could not be used, and why.
    """

    num_made: int
    num_kept: int
    damaged: dict[str, str]
    skipped: dict[str, str]


def synthesise(photos: Path, out: Path, cfg: SynthCfg, progress: Progress | None = None) -> SynthResult:
    """Make pairs from photos and write them as shards, going on where an earlier run stopped.

    Raises:
        ImageError: no such folder of photos, or none that can be read.
        FileFormatError: the folder cannot be written, or its index cannot be read.
        L2MError: a number is out of its range, the folder was begun with other settings, another run is at work in it,
            or the settings allow no pair.
    """
    tell = progress or (lambda done, message: None)
    for name, value in (("--num", cfg.num), ("--shard-size", cfg.shard_size)):
        if value < 1:
            raise L2MError("synth", expected=f"{name} of at least 1", got=str(value))
    if cfg.workers < 0:
        raise L2MError("synth", expected="--workers of at least 0", got=str(cfg.workers))
    stream = PairStream(photos, cfg.pair, batch_size=1, seed=cfg.seed, difficulty=cfg.difficulty)
    with _only_run(out):
        _remove_leftovers(out)
        index, damaged = _resumed(out, cfg, _settings(photos, cfg, stream))
        kept = index.num_made
        tell(kept, f"{kept} of {cfg.num} pairs were there" if kept else "")
        for name, what in damaged.items():
            tell(kept, f"{name} {what}: making it again")
        skipped = _make_shards(out, cfg, _Encoder(photos, stream), index, tell)
    return SynthResult(cfg.num - kept, kept, damaged, skipped)


# --- going on ------------------------------------------------------------------------------------------------


@contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """Keep a second run out; the system drops the lock of a process that was killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK_NAME).open("ab")
    except OSError as error:
        todo = "choose a folder that you can write to"
        raise FileFormatError(
            f"cannot write {folder}", got=error.strerror or str(error), todo=todo
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            todo = "wait for it, or choose another folder"
            raise L2MError(f"another run is at work in {folder}", todo=todo) from error
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` that a killed run could not."""
    for pattern in (".pairs-*.tar.*", f".{INDEX_NAME}.*"):
        for path in folder.glob(pattern):
            remove_file(path)


def _resumed(out: Path, cfg: SynthCfg, settings: dict[str, Any]) -> tuple[ShardIndex, dict[str, str]]:
    """The index with the shards that can stay, and what is wrong with the others."""
    wanted = ShardIndex(settings, cfg.num)
    if not (out / INDEX_NAME).exists():
        return wanted, {}
    index = ShardIndex.load(out)
    if differences := _differences(index.settings, wanted.settings):
        raise L2MError(
            f"{out} was begun with other settings",
            expected=", ".join(f"{name} {old}" for name, (old, _) in differences.items()),
            got=", ".join(str(new) for _, new in differences.values()),
            todo="take the same settings or another folder",
        )
    if index.num_pairs > cfg.num:
        todo = "shards are never taken away; choose another folder"
        raise L2MError(f"{out}", expected=f"--num of at least {index.num_pairs}", got=str(cfg.num), todo=todo)
    sizes = {shard_name(number): len(pairs) for number, pairs in enumerate(_plan(cfg))}
    # A last shard that was not full grows with --num: no damage.
    shards = [shard for shard in index.shards if sizes.get(shard.name) == shard.num_pairs]
    damage = {shard.name: shard_damage(out, shard, verify=cfg.verify) for shard in shards}
    whole = tuple(shard for shard in shards if not damage[shard.name])
    return replace(wanted, shards=whole), {name: what for name, what in damage.items() if what}


def _settings(photos: Path, cfg: SynthCfg, stream: PairStream) -> dict[str, Any]:
    """Everything that decides what the pairs are, as JSON gives it back.

    Of the photos it is their names and sizes: to read them all would take as long as some of the pairs.
    """
    lines = (f"{photo}\0{(photos / photo).stat().st_size}\n" for photo in stream.photos)
    settings = {
        "version": __version__,
        "seed": cfg.seed,
        "shard_size": cfg.shard_size,
        "photos": {
            "number": len(stream.photos),
            "sha256": hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest(),
        },
        "difficulty": cfg.difficulty,
        "pair": asdict(cfg.pair),
    }
    return json.loads(json.dumps(settings))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, with both values, under dotted names."""
    found = {}
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= {f"{name}.{inner}": values for inner, values in _differences(before, after).items()}
        elif before != after:
            found[name] = before, after
    return found


def _plan(cfg: SynthCfg) -> list[range]:
    """Numbers of the pairs of each shard.

    >>> [list(pairs) for pairs in _plan(SynthCfg(num=5, shard_size=3))]
    [[0, 1, 2], [3, 4]]
    """
    starts = range(0, cfg.num, cfg.shard_size)
    return [range(start, min(start + cfg.shard_size, cfg.num)) for start in starts]


# --- making shards -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    """What a worker sends. Errors come as values: raised over there they would lose their type."""

    index: int
    parts: dict[str, bytes]
    skipped: dict[str, str]
    error: L2MError | None = None


class _Encoder(Dataset[_Encoded]):
    """Pairs of a stream, by number, as the bytes that go into a shard."""

    def __init__(self, folder: Path, stream: PairStream) -> None:
        self._folder, self._stream = folder, stream

    def __getitem__(self, index: int) -> _Encoded:
        try:
            with warnings.catch_warnings(action="ignore"):  # the parent warns, once for all workers
                made = self._stream.pair(index)
            return _Encoded(index, encode_pair(self._record(made)), dict(self._stream.skipped))
        except L2MError as error:
            return _Encoded(index, {}, dict(self._stream.skipped), error)

    def _record(self, made: StreamedPair) -> PairRecord:
        settings = asdict(replace(self._stream.cfg, difficulty=made.difficulty))
        path = self._folder / made.photo
        try:
            with path.open("rb") as file:
                photo_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ImageError(f"cannot read {path} again", got=error.strerror or str(error)) from error
        return PairRecord(made.index, made.pair, made.photo, photo_sha256, made.background, settings)


def _make_shards(
    out: Path, cfg: SynthCfg, encoder: _Encoder, index: ShardIndex, tell: Progress
) -> dict[str, str]:
    """Make the shards that the index lacks, one after the other; return the photos that were skipped."""
    shards = {shard.name: shard for shard in index.shards}
    plan = {shard_name(number): pairs for number, pairs in enumerate(_plan(cfg))}
    missing = {name: pairs for name, pairs in plan.items() if name not in shards}
    if not missing:
        return {}
    skipped: dict[str, str] = {}
    if index.shards:
        index.save(
            out
        )  # without the damaged ones; before the first one is made there is nothing to go on with
    made = _told(_encoded_pairs(encoder, list(missing.values()), cfg.workers), index.num_made, skipped, tell)
    with closing(made):  # stops the workers before the lock is gone
        for name, pairs in missing.items():
            shards[name] = write_shard(out / name, islice(made, len(pairs)))
            replace(index, shards=tuple(shards[name] for name in sorted(shards))).save(out)
    return skipped


def _told(
    made: Iterator[_Encoded], done: int, skipped: dict[str, str], tell: Progress
) -> Generator[tuple[int, dict[str, bytes]], None, None]:
    """Hand pairs on, count them, and warn once of every photo that was skipped."""
    for pair in made:
        for photo, reason in pair.skipped.items():
            if photo not in skipped:
                skipped[photo] = reason
                tell(done, f"skipping photo {len(skipped)}, {photo}: {reason}")
        if pair.error is not None:
            raise pair.error
        done += 1
        tell(done, "")
        yield pair.index, pair.parts


def _encoded_pairs(encoder: _Encoder, plan: list[range], workers: int) -> Iterator[_Encoded]:
    """Make and encode the pairs of a plan, in its order, whichever worker is first."""
    loader = DataLoader(
        encoder,
        batch_size=None,
        sampler=chain.from_iterable(plan),
        num_workers=workers,
        collate_fn=_as_is,
        # A fork after OpenMP has started would hang.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),
    )
    try:
        with _interrupts_ignored():  # children inherit it: Ctrl-C is the parent's to answer
            pairs = iter(loader)
        yield from pairs
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        todo = "most often memory ran out: take fewer workers, and run the same command again"
        raise L2MError("synth: a worker process ended", got=str(error).strip(), todo=todo) from error


def _as_is(made: Any) -> Any:  # noqa: ANN401 (the loader's type says a list of samples)
    return made


def _init_worker(worker: int) -> None:
    """One core for each worker, and no life after the parent's."""
    use_one_thread(worker)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)  # the loader's own watch may wait for ever for somebody to take the last result

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python cannot set it, and need not
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
