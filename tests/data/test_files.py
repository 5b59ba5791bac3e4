"""Atomic writes, npz without pickles, results that load what they saved."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from l2m_viz.data import Saved, atomic_write, load_npz, save_npz, write_text
from l2m_viz.errors import FileFormatError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result(Saved):
    """One field of each kind."""

    warp: torch.Tensor
    mask: torch.Tensor
    scalar: torch.Tensor
    extra: torch.Tensor | None
    hw: tuple[int, int]
    nested: tuple[tuple[int, float], ...]
    name: str
    score: float
    options: dict[str, int]


@dataclass(frozen=True)
class Other(Saved):
    """Another type with a field in common."""

    warp: torch.Tensor


@dataclass(frozen=True)
class Outer(Saved):
    """Holds other results, one of which may be absent."""

    inner: Result
    maybe: Other | None = None
    count: int = 0


def result() -> Result:
    warp = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(15).reshape(3, 5) % 2 == 0
    return Result(warp, mask, torch.tensor(2.5), None, (3, 5), ((1, 0.5), (2, 0.25)), "é", 1 / 3, {"a": 1})


def test_atomic_write_creates_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b.bin"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()  # not before the end
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["b.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "b.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["b.bin"]


def test_atomic_write_survives_kill(tmp_path):
    path = tmp_path / "b.bin"
    path.write_bytes(b"old")
    script = f"""
        import os, signal
        from l2m_viz.data.files import atomic_write
        with atomic_write({str(path)!r}) as file:
            file.write(b"x" * 100_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_write_text_is_utf8(tmp_path):
    write_text(tmp_path / "t.txt", "naïve – 你好\n")
    assert (tmp_path / "t.txt").read_bytes() == "naïve – 你好\n".encode()


def test_npz_round_trip(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.zeros((0, 4), np.float32)}
    save_npz(tmp_path / "x.npz", arrays, {"k": [1, "two", None]})
    loaded, meta = load_npz(tmp_path / "x.npz")
    assert meta == {"k": [1, "two", None]}
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)


def test_npz_keeps_its_name(tmp_path):
    save_npz(tmp_path / "match.bin", {"a": np.zeros(1)}, {})  # NumPy alone would add .npz
    assert [p.name for p in tmp_path.iterdir()] == ["match.bin"]


def test_saved_round_trip(tmp_path):
    before = result()
    before.save(tmp_path / "r.npz")
    after = Result.load(tmp_path / "r.npz")
    for name in ("warp", "mask", "scalar"):
        one, two = getattr(before, name), getattr(after, name)
        assert one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    for name in ("extra", "hw", "nested", "name", "score", "options"):
        assert getattr(before, name) == getattr(after, name), name
    after.warp.zero_()  # writable, its own memory


def test_saved_detaches_and_packs(tmp_path):
    Other(torch.zeros(4, 3, requires_grad=True).T.expand(2, 3, 4)).save(tmp_path / "o.npz")
    loaded = Other.load(tmp_path / "o.npz").warp
    assert tuple(loaded.shape) == (2, 3, 4) and not loaded.requires_grad


def test_a_saved_inside_a_saved(tmp_path):
    whole = Outer(result(), Other(torch.ones(2, 3)), 7)
    whole.save(tmp_path / "o.npz")
    arrays, meta = load_npz(tmp_path / "o.npz")
    assert {"inner.warp", "inner.mask", "inner.scalar", "maybe.warp"} == set(arrays)
    assert meta["fields"]["inner.name"] == "é"
    loaded = Outer.load(tmp_path / "o.npz")
    assert type(loaded.inner) is Result and torch.equal(loaded.inner.warp, whole.inner.warp)
    assert loaded.inner.nested == whole.inner.nested and loaded.inner.options == {"a": 1}
    assert torch.equal(loaded.maybe.warp, torch.ones(2, 3)) and loaded.count == 7
    Outer(result()).save(tmp_path / "o.npz")
    assert Outer.load(tmp_path / "o.npz").maybe is None


def test_a_saved_inside_two_others(tmp_path):
    @dataclass(frozen=True)
    class Outermost(Saved):
        outer: Outer

    Outermost(Outer(result(), Other(torch.ones(2)))).save(tmp_path / "o.npz")
    assert "outer.maybe.warp" in load_npz(tmp_path / "o.npz")[0]
    assert torch.equal(Outermost.load(tmp_path / "o.npz").outer.maybe.warp, torch.ones(2))


def test_bytes_are_the_file(tmp_path):
    result().save(tmp_path / "r.npz")
    data = result().to_bytes()
    assert data == (tmp_path / "r.npz").read_bytes()
    assert torch.equal(Result.from_bytes(data, "block").warp, result().warp)
    for damaged in (data[:-1], data[:50], b"", b"hello"):
        with pytest.raises(FileFormatError, match="cannot read block"):
            Result.from_bytes(damaged, "block")
    with pytest.raises(FileFormatError, match="cannot load block"):
        Other.from_bytes(data, "block")


def test_wrong_fields_inside(tmp_path):
    Outer(result(), Other(torch.ones(2, 3)), 7).save(tmp_path / "o.npz")
    arrays, meta = load_npz(tmp_path / "o.npz")
    plain = meta["fields"]
    warp = arrays.pop("maybe.warp")
    for more, change in [
        ({}, {}),  # a field of the inner one is absent
        ({"maybe.other": warp}, {}),
        ({"maybe.warp": warp, "maybe.more": warp}, {}),
        ({"maybe.warp": warp}, {"maybe": None}),  # fields of what is not there
        ({"maybe.warp": warp}, {"maybe": {"type": "Result"}}),
        ({"maybe.warp": warp}, {"maybe": {}}),
        ({"maybe.warp": warp}, {"maybe": 3}),
        ({"maybe.warp": warp, "maybe": warp}, {}),
        ({"maybe.warp": warp}, {"maybe.warp": 1}),
        ({"count.warp": warp}, {"maybe": None}),  # not a field that holds others
        ({"maybe.warp": np.array(["text"])}, {}),
    ]:
        save_npz(tmp_path / "x.npz", {**arrays, **more}, {**meta, "fields": {**plain, **change}})
        with pytest.raises(FileFormatError, match="cannot load"):
            Outer.load(tmp_path / "x.npz")


def test_wrong_type_and_fields(tmp_path):
    result().save(tmp_path / "r.npz")
    with pytest.raises(FileFormatError, match="a Other with"):
        Other.load(tmp_path / "r.npz")
    warp = np.zeros((2, 3), np.float32)
    for arrays, meta in [
        ({"warp": warp}, {}),
        ({"warp": warp}, {"type": "Result", "fields": {}}),
        ({"warp": warp, "more": warp}, {"type": "Other", "fields": {}}),
        ({}, {"type": "Other", "fields": {}}),
        ({}, {"type": "Other", "fields": ["warp"]}),
        ({"warp": warp}, {"type": "Other", "fields": {"warp": None}}),
        ({"warp": np.array(["text"])}, {"type": "Other", "fields": {}}),
    ]:
        save_npz(tmp_path / "x.npz", arrays, meta)
        with pytest.raises(FileFormatError, match="cannot load"):
            Other.load(tmp_path / "x.npz")


def test_a_file_from_before_an_optional_field_still_loads(tmp_path):
    from l2m_viz.matching import Match

    warp = torch.zeros(2, 3, 2)
    Match(warp, warp[..., 0], warp, warp[..., 0], (20, 30), (20, 30), "old").save(tmp_path / "m.npz")
    arrays, meta = load_npz(tmp_path / "m.npz")
    del meta["fields"]["keypoints_A"]
    save_npz(tmp_path / "old.npz", arrays, meta)
    assert Match.load(tmp_path / "old.npz").keypoints_A is None


def test_pickles_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    meta = np.frombuffer(json.dumps({"type": "Other", "fields": {}}).encode(), np.uint8)
    bomb = np.empty(1, object)
    bomb[0] = Bomb()
    np.savez(tmp_path / "x.npz", __meta__=meta, warp=bomb)
    (tmp_path / "bare.npz").write_bytes(b"\x80\x04\x95.")
    for name in ("x.npz", "bare.npz"):
        with pytest.raises(FileFormatError):
            Other.load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_foreign_files(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    np.savez(tmp_path / "b.npz", a=np.zeros((2, 3)))
    np.savez(tmp_path / "c.npz", __meta__=np.frombuffer(b"[1, 2]", np.uint8))
    (tmp_path / "d.npz").write_bytes(b"")
    (tmp_path / "e.npz").write_text("hello")
    for name in ("a.npy", "b.npz", "c.npz", "d.npz", "e.npz", "."):
        with pytest.raises(FileFormatError, match="cannot read"):
            load_npz(tmp_path / name)
    with pytest.raises(FileFormatError, match="no such file"):
        load_npz(tmp_path / "absent.npz")


def test_truncated_and_damaged_npz(tmp_path):
    path = tmp_path / "r.npz"
    result().save(path)
    data = path.read_bytes()
    for cut in (1, 10, 100, len(data) // 2, len(data) - 30, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(FileFormatError):
            Result.load(path)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            Result.load(path)  # a flip in a time stamp is harmless
        except FileFormatError:
            refused += 1
    assert refused > 75
