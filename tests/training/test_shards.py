"""Shards give back the pairs that were put in, end the same however often the work is stopped, and tell of damage."""

import fcntl
import gc
import hashlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from l2m_viz.cli import main
from l2m_viz.data import atomic_write, load_sample, read_image, resize_image, write_image
from l2m_viz.errors import FileFormatError, L2MError, ShapeError
from l2m_viz.jobs import inspect_shards
from l2m_viz.synth import SynthCfg, synthesise
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.shards import (
    PairRecord,
    ShardIndex,
    ShardReader,
    damaged_shards,
    decode_pair,
    encode_pair,
    write_shard,
)
from l2m_viz.training.stream import PairStream

HW = (48, 64)
CFG = SynthCfg(num=11, shard_size=4, seed=3, pair=PairCfg(hw=HW, difficulty=0.7))
PNG_A, PNG_B, TRUTH, INFO = "image_A.png", "image_B.png", "truth.npz", "json"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_image(folder / "coffee.jpg", resize_image(load_sample("coffee").image_A, (90, 130)))
    write_image(folder / "more" / "rocket.png", resize_image(load_sample("rocket").image_A, (80, 120)))
    write_image(folder / "more" / "stereo.jpg", resize_image(load_sample("motorcycle").image_A, (100, 110)))
    return folder


@pytest.fixture(scope="module")
def record(photos):
    """A pair with everything: another light, and another photo behind its holes."""
    cfg = PairCfg(hw=HW, holes="background", p_relight=1.0)
    made = PairStream(photos, cfg, batch_size=1, seed=5).pair(7)
    sha256 = hashlib.sha256((photos / made.photo).read_bytes()).hexdigest()
    return PairRecord(made.index, made.pair, made.photo, sha256, made.background, {"hw": list(HW)})


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A folder of 3 shards with 4, 4 and 3 pairs, made without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    synthesise(photos, folder, CFG)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """The same folder, to be damaged."""
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def _contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _assert_same_pair(stored, made):
    for field in fields(made):
        ours, theirs = getattr(stored, field.name), getattr(made, field.name)
        if field.name.startswith("image"):
            assert (ours - theirs).abs().max() <= 0.5 / 255 + 1e-6
        elif isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


# --- one pair ------------------------------------------------------------------------------------------------


def test_a_pair_comes_back_bit_by_bit_but_for_eight_bit_colours(record):
    again = decode_pair(encode_pair(record))
    assert record.pair.inpainted_mask_B.any() and record.background is not None
    _assert_same_pair(again.pair, record.pair)
    assert replace(again, pair=record.pair) == record
    assert encode_pair(again) == encode_pair(record)  # and is stable from then on


def test_warps_that_depth_and_cameras_do_not_give_are_refused(record):
    with pytest.raises(L2MError, match="others in pair 7"):
        encode_pair(replace(record, pair=replace(record.pair, warp_B_to_A=record.pair.warp_B_to_A + 1e-6)))


def test_giant_pairs_are_refused_before_they_are_written(record, unchecked):
    giant = torch.zeros(1, 1).expand(4097, 4096)
    with pytest.raises(ShapeError, match="one size"):
        encode_pair(replace(record, pair=replace(record.pair, depth_A=giant, depth_B=giant)))
    with pytest.raises(ShapeError, match="one size"):
        encode_pair(replace(record, pair=replace(record.pair, depth_B=record.pair.depth_B[1:])))


def _npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _truth_with(parts: dict[str, bytes], *, compress: bool = False, **changed) -> dict[str, bytes]:
    """The parts with other arrays in their npz."""
    with np.load(io.BytesIO(parts[TRUTH])) as archive:
        arrays = {**archive, **changed}
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    return {**parts, TRUTH: buffer.getvalue()}


def _info_with(parts: dict[str, bytes], **changed) -> dict[str, bytes]:
    return {**parts, INFO: json.dumps({**json.loads(parts[INFO]), **changed}).encode()}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda p: {key: p[key] for key in (PNG_A, PNG_B, TRUTH)}, "json, got NoneType"),
        (lambda p: {**p, INFO: b" " * 2**16 + p[INFO]}, "at most 65536 B of json"),
        (lambda p: {**p, INFO: b"[" * 60000}, "the JSON of a pair"),
        (lambda p: {**p, INFO: b"[1, 2]"}, "the JSON of a pair"),
        (lambda p: _info_with(p, seed=-1), r"something else in \['seed'\]"),
        (lambda p: _info_with(p, index=True), r"something else in \['index'\]"),
        (lambda p: _info_with(p, photo=["x"]), r"something else in \['photo'\]"),
        (lambda p: _info_with(p, K_A=[[1, 0, 0]]), r"something else in \['K_A'\]"),
        (lambda p: _info_with(p, T_A_to_B=[[float("nan")] * 4] * 4), r"something else in \['T_A_to_B'\]"),
        (lambda p: _truth_with(p, compress=True), "not compressed"),
        (lambda p: _truth_with(p, depth_A=np.zeros(HW)), "depth_A"),
        (lambda p: _truth_with(p, depth_B=np.zeros((HW[0], HW[1] - 1), np.float32)), "depth_B"),
        (lambda p: _truth_with(p, valid_A=np.zeros(HW, np.uint8)), "valid_A"),
        (lambda p: {**p, TRUTH: _npz(depth_A=np.array([{}], object))}, "cannot read pair"),
        (lambda p: {**p, TRUTH: p[TRUTH][:-1]}, "cannot read pair"),
        (lambda p: {**p, PNG_A: p[PNG_A][:-30]}, "cannot read the image bytes"),
        (lambda p: {**p, PNG_B: _png(np.zeros((HW[0], HW[1] - 8, 3), np.uint8))}, "two views of one size"),
        (lambda p: {**p, PNG_A: _png(np.zeros((4097, 4096), np.uint8))}, "million pixels"),
    ],
)
def test_foreign_parts_are_refused_by_name(record, spoil, complaint, unchecked):
    with pytest.raises(L2MError, match=complaint):
        decode_pair(spoil(encode_pair(record)))


def _png(array: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


# --- reading -------------------------------------------------------------------------------------------------


def test_shards_hold_the_pairs_of_the_stream(photos, finished):
    reader = ShardReader(finished)
    stream = PairStream(photos, CFG.pair, batch_size=1, seed=CFG.seed)
    assert len(reader) == CFG.num
    for index, pair in enumerate(reader):
        made = stream.pair(index)
        _assert_same_pair(pair, made.pair)
        record = reader.record(index)
        assert (record.index, record.photo) == (index, made.photo)
        assert record.photo_sha256 == hashlib.sha256((photos / made.photo).read_bytes()).hexdigest()
        assert record.settings["difficulty"] == made.difficulty == 0.7


def test_a_reader_is_a_sequence_that_travels_to_workers(finished):
    reader = pickle.loads(pickle.dumps(ShardReader(finished)))
    seeds = [pair.seed for pair in reader]
    assert len(set(seeds)) == CFG.num
    assert [reader[position].seed for position in (4, 10, -1)] == [seeds[4], seeds[10], seeds[10]]
    for position in (CFG.num, -CFG.num - 1):
        with pytest.raises(IndexError):
            reader[position]


def test_one_shard_is_read_without_its_index(finished, tmp_path):
    lone = tmp_path / "renamed.tar"
    lone.write_bytes((finished / "pairs-000001.tar").read_bytes())
    reader, whole = ShardReader(lone), ShardReader(finished)
    assert [reader.record(i).index for i in range(len(reader))] == [4, 5, 6, 7]
    assert reader[2].seed == whole[6].seed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_the_webdataset_library_reads_the_same_arrays(finished):
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(finished.glob("*.tar"))]
    raw = list(webdataset.WebDataset(shards, shardshuffle=False))
    decoded = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb"))
    gc.collect()  # the library leaves its files open
    ours = ShardReader(finished)
    assert len(raw) == len(decoded) == len(ours)
    for index, (sample, arrays, pair) in enumerate(zip(raw, decoded, ours, strict=True)):
        assert sample["__key__"] == f"{index:09d}"
        _assert_same_pair(decode_pair(sample).pair, pair)
        np.testing.assert_allclose(arrays["image_b.png"], pair.image_B.numpy(), atol=1e-6)
        np.testing.assert_array_equal(arrays["truth.npz"]["depth_B"], pair.depth_B.numpy())
        covisible = np.unpackbits(arrays["truth.npz"]["covisibility_A_to_B"], axis=1, count=HW[1])
        np.testing.assert_array_equal(covisible.astype(bool), pair.covisibility_A_to_B.numpy())
        np.testing.assert_array_equal(np.float32(arrays["json"]["T_A_to_B"]), pair.T_A_to_B.numpy())


def _shard_of(path, *members: tarfile.TarInfo, parts: dict[str, bytes] | None = None):
    """A tar that holds the members, with zeros for content, behind a good pair."""
    with tarfile.open(path, "w") as tar:
        for name, data in (parts or {}).items():
            info = tarfile.TarInfo(f"000000000.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in members:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return path


def _member(name: str, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "member",
    [
        _member("../000000001.json", size=3),
        _member("/tmp/000000001.json", size=3),
        _member("000000001.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        _member("000000001.json", type=tarfile.LNKTYPE, linkname="000000000.json"),
        _member("000000001.json", type=tarfile.DIRTYPE),
        _member("000000001.json", type=tarfile.CHRTYPE),
        _member("000000001.json", size=2**16 + 1),
        _member("000000001.pickle", size=3),
        _member("000000000.json", size=3),
        _member("000000001.json", size=3),
    ],
    ids=["up", "absolute", "symlink", "link", "folder", "device", "giant", "pickle", "twice", "alone"],
)
def test_members_that_have_no_business_in_a_shard_are_refused(record, tmp_path, member):
    path = _shard_of(tmp_path / "x.tar", member, parts=encode_pair(record))
    with pytest.raises(FileFormatError, match=r"x\.tar"):
        ShardReader(path)[0]


def test_what_is_no_shard_says_so(tmp_path, copied):
    (tmp_path / "text.tar").write_text("no tar at all\n" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    for name, complaint in (("text.tar", "cannot read"), ("empty.tar", "cannot read"), ("no.tar", "no such")):
        with pytest.raises(FileFormatError, match=complaint):
            len(ShardReader(tmp_path / name))
    for text in ("{", "[]", '{"format": "other"}'):
        (copied / "index.json").write_text(text)
        with pytest.raises(FileFormatError, match=r"index\.json"):
            ShardReader(copied)
    (copied / "index.json").unlink()
    with pytest.raises(FileFormatError, match=r"no index\.json"):
        ShardReader(copied)


def test_an_index_cannot_lead_out_of_its_folder(copied):
    index = ShardIndex.load(copied)
    wrong = replace(index.shards[0], name="../pairs-000000.tar")
    replace(index, shards=(wrong,)).save(copied)
    with pytest.raises(FileFormatError, match=r"\.\./pairs"):
        ShardReader(copied)


# --- damage --------------------------------------------------------------------------------------------------


def _flip(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_every_flipped_bit_is_found_and_no_reader_falls_over_it(copied):
    path, draw = copied / "pairs-000001.tar", random.Random(0)
    whole = path.read_bytes()
    raised = 0
    for place in [*draw.sample(range(len(whole)), 60), 0, 100, 512, 600, len(whole) - 1]:
        _flip(path, place)
        assert damaged_shards(copied) == {"pairs-000001.tar": "has another hash"}
        try:
            list(ShardReader(copied))
        except L2MError as error:
            raised += 1
            assert "pairs-000001.tar" in str(error) or "image bytes" in str(error)
        path.write_bytes(whole)
    assert raised > 40  # what has a checksum of its own: all but JSON and the filling between members
    assert damaged_shards(copied) == {}


@pytest.mark.parametrize("size", [0, 100, 512, 5000, -1024, -1])
def test_a_truncated_shard_is_found_and_named(copied, size):
    path = copied / "pairs-000002.tar"
    path.write_bytes(path.read_bytes()[:size])
    assert "pairs-000002.tar" in damaged_shards(copied)
    reader = ShardReader(copied)
    assert reader[7].seed  # the others can be read
    with pytest.raises(FileFormatError, match=r"pairs-000002\.tar has \d+ B instead of \d+"):
        reader[8]


def test_a_tar_cut_between_two_pairs_or_members_is_no_whole_tar(finished, tmp_path):
    whole = (finished / "pairs-000000.tar").read_bytes()
    with tarfile.open(finished / "pairs-000000.tar") as tar:
        starts = [member.offset for member in tar]
    for start in starts[1:]:
        (tmp_path / "cut.tar").write_bytes(whole[:start])
        with pytest.raises(FileFormatError, match=r"cut\.tar"):
            len(ShardReader(tmp_path / "cut.tar"))


def test_damaged_and_missing_shards_are_made_again(photos, finished, copied):
    _flip(copied / "pairs-000000.tar", 3000)
    (copied / "pairs-000001.tar").unlink()
    kept = (copied / "pairs-000002.tar").stat().st_mtime_ns
    result = synthesise(photos, copied, replace(CFG, verify=True))
    assert result.damaged == {"pairs-000000.tar": "has another hash", "pairs-000001.tar": "is missing"}
    assert (result.num_made, result.num_kept) == (8, 3)
    assert _contents(copied) == _contents(finished)
    assert (copied / "pairs-000002.tar").stat().st_mtime_ns == kept


# --- stopping and going on -----------------------------------------------------------------------------------


def test_a_finished_run_does_nothing(photos, copied):
    before = {path: path.stat().st_mtime_ns for path in copied.iterdir() if path.name != ".lock"}
    said = []
    result = synthesise(photos, copied, CFG, lambda done, message: said.append((done, message)))
    assert (result.num_made, result.num_kept) == (0, CFG.num)
    assert said == [(11, "11 of 11 pairs were there")]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_grows_into_what_it_would_have_been(photos, copied, tmp_path_factory):
    more = replace(CFG, num=14)
    result = synthesise(photos, copied, more)
    fresh = tmp_path_factory.mktemp("fresh")
    synthesise(photos, fresh, more)
    assert (result.num_kept, result.num_made, result.damaged) == (8, 6, {})
    assert _contents(copied) == _contents(fresh)
    with pytest.raises(L2MError, match="--num of at least 14, got 11"):
        synthesise(photos, copied, CFG)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"seed": 4}, "seed 3, got 4"),
        ({"shard_size": 5}, "shard_size 4, got 5"),
        ({"difficulty": (0.0, 1.0)}, r"difficulty None, got \[0.0, 1.0\]"),
        ({"pair": PairCfg(hw=HW, difficulty=0.7, min_overlap=0.2)}, "pair.min_overlap 0.15, got 0.2"),
    ],
)
def test_other_settings_are_named(photos, copied, changed, complaint):
    before = _contents(copied)
    with pytest.raises(L2MError, match=f"begun with other settings: expected {complaint}"):
        synthesise(photos, copied, replace(CFG, **changed))
    assert _contents(copied) == before


def test_other_photos_are_another_setting(photos, copied, tmp_path_factory):
    others = tmp_path_factory.mktemp("others")
    write_image(others / "coffee.jpg", read_image(photos / "coffee.jpg"))
    with pytest.raises(L2MError, match=r"photos\.number 3, photos\.sha256"):
        synthesise(others, copied, CFG)


def test_two_runs_do_not_write_into_one_folder(photos, tmp_path):
    with (tmp_path / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(L2MError, match="another run is at work"):
            synthesise(photos, tmp_path, CFG)
    assert synthesise(photos, tmp_path, replace(CFG, num=1)).num_made == 1


def test_unreadable_photos_are_skipped_with_one_counted_message_each(photos, tmp_path):
    for name in ("coffee.jpg", "more/rocket.png"):
        with atomic_write(tmp_path / "in" / name) as file:
            file.write((photos / name).read_bytes())
    (tmp_path / "in" / "torn.jpg").write_bytes((photos / "coffee.jpg").read_bytes()[:500])
    (tmp_path / "in" / "text.png").write_text("no picture")
    said = []
    result = synthesise(tmp_path / "in", tmp_path / "out", CFG, lambda done, message: said.append(message))
    assert result.skipped.keys() == {"torn.jpg", "text.png"}
    warned = [message for message in said if message]
    assert len(warned) == 2 and warned[0].startswith("skipping photo 1, ") and "photo 2" in warned[1]
    used = {ShardReader(tmp_path / "out").record(index).photo for index in range(CFG.num)}
    assert used == {"coffee.jpg", "more/rocket.png"}


def test_a_run_that_made_nothing_leaves_the_folder_to_another(photos, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.png").write_text("no picture")
    with pytest.raises(L2MError):
        synthesise(tmp_path / "bad", tmp_path / "out", CFG)
    assert synthesise(photos, tmp_path / "out", replace(CFG, num=2)).num_made == 2


@pytest.mark.parametrize("difficulty", [(2.0, 1.0), (-1.0, 1.0), (0.0, float("nan")), (0.5, float("inf"))])
def test_a_range_of_difficulty_that_is_none_is_refused(photos, difficulty):
    with pytest.raises(L2MError, match="lowest <= highest"):
        PairStream(photos, batch_size=1, difficulty=difficulty)


def test_a_sheet_is_a_png(finished, tmp_path):
    with pytest.raises(L2MError, match=r"\.png"):
        list(inspect_shards(finished, num=2, out=tmp_path / "sheet.jpg", verify=False))


@pytest.mark.parametrize("changed", [{"num": 0}, {"shard_size": 0}, {"workers": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(photos, tmp_path, changed):
    with pytest.raises(L2MError, match="at least"):
        synthesise(photos, tmp_path / "out", replace(CFG, **changed))
    assert not (tmp_path / "out").exists()


def _started(photos, out, *options: object) -> subprocess.Popen:
    """`l2m synth` as a user starts it, in a process group of its own."""
    arguments = ["synth", photos, out, "--num", 60, "--shard-size", 20, "--seed", 3, *options]
    arguments += ["--pair.hw", *HW, "--pair.difficulty", 0.7]
    return subprocess.Popen(
        [sys.executable, "-c", "from l2m_viz.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


BIG = replace(CFG, num=60, shard_size=20)


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    synthesise(photos, folder, BIG)
    return _contents(folder)


def _wait_for(folder, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_run_loses_the_shard_in_work_and_repeats_nothing(photos, tmp_path, uninterrupted):
    with _started(photos, tmp_path) as process:
        _wait_for(tmp_path, ".pairs-000001.tar.*", process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".pairs-000001.tar.*"))  # it was in the middle of a shard
    index = ShardIndex.load(tmp_path)
    assert [shard.name for shard in index.shards] == ["pairs-000000.tar"] and index.num_pairs == 60
    assert damaged_shards(tmp_path) == {}
    assert len(ShardReader(tmp_path)) == 20  # what is there can be used
    first = (tmp_path / "pairs-000000.tar").stat().st_mtime_ns
    result = synthesise(photos, tmp_path, BIG)
    assert (result.num_kept, result.num_made) == (20, 40)
    assert (tmp_path / "pairs-000000.tar").stat().st_mtime_ns == first
    assert _contents(tmp_path) == uninterrupted


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_half_of_a_file_and_no_traceback(photos, tmp_path, uninterrupted):
    with _started(photos, tmp_path) as process:
        _wait_for(tmp_path, ".pairs-000001.tar.*", process)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "index.json", "pairs-000000.tar"}
    synthesise(photos, tmp_path, BIG)
    assert _contents(tmp_path) == uninterrupted


def _children(pid: int) -> list[int]:
    shown = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in shown.stdout.split()]


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent as a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_make_the_same_shards_and_end_with_their_parent(photos, tmp_path, uninterrupted, number):
    with _started(photos, tmp_path, "--workers", 2) as process:
        _wait_for(tmp_path, ".pairs-000001.tar.*", process)
        workers = _children(process.pid)
        assert len(workers) >= 2
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said = process.communicate()[0]
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while any(map(_alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    with _started(photos, tmp_path, "--workers", 3) as process:
        said = process.communicate()[0]
    assert process.returncode == 0, said
    assert _contents(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line(photos, tmp_path):
    with _started(photos, tmp_path, "--workers", 2) as process:
        _wait_for(tmp_path, ".pairs-000001.tar.*", process)
        os.kill(_children(process.pid)[-1], signal.SIGKILL)
        said = process.communicate()[0]
    assert process.returncode == 2
    assert "l2m: synth: a worker process ended" in said and "Traceback" not in said


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_in_the_same_bytes(photos, tmp_path, uninterrupted):
    draw, kills = random.Random(1), 0
    while True:
        with _started(photos, tmp_path) as process:
            if kills < 8:
                _wait_for(tmp_path, ".lock", process)
                time.sleep(draw.uniform(0, 0.6))
                process.kill()
                kills += process.wait() == -signal.SIGKILL
            said = process.communicate()[0]
        assert not (tmp_path / "index.json").exists() or damaged_shards(tmp_path) == {}
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
    assert kills > 0
    assert _contents(tmp_path) == uninterrupted


# --- the commands --------------------------------------------------------------------------------------------


def _run(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["l2m", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_synth_and_inspect_as_commands(photos, finished, tmp_path, monkeypatch, capsys):
    options = ["--num", 11, "--shard-size", 4, "--seed", 3, "--pair.hw", *HW, "--pair.difficulty", 0.7]
    said = _run(monkeypatch, capsys, "synth", photos, tmp_path / "out", *options)
    assert "11 pairs made, 0 were there" in said
    assert _contents(tmp_path / "out") == _contents(finished)
    picture = tmp_path / "pairs.png"
    said = _run(monkeypatch, capsys, "inspect", tmp_path / "out", "--num", 3, "--out", picture, "--verify")
    pair = ShardReader(finished)[5]
    assert f"pair 5: 48x64, overlap {pair.overlap:.2f}, seed {pair.seed}, " in said
    assert said.count("seed") == 3 and "every byte of 11 pairs" in said
    assert read_image(picture).shape[1] > 1000
    _flip(tmp_path / "out" / "pairs-000001.tar", 700)
    with pytest.raises(SystemExit):
        _run(monkeypatch, capsys, "inspect", tmp_path / "out", "--verify", "--out", picture)
    assert "pairs-000001.tar has another hash" in capsys.readouterr().err


def test_the_same_pairs_make_the_same_bytes(record, tmp_path):
    shards = []
    for name in ("pairs-000000.tar", "pairs-000001.tar"):
        shards.append(write_shard(tmp_path / name, [(7, encode_pair(record))]))
        time.sleep(0.01)
    assert shards[0].sha256 == shards[1].sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert shards[0].bytes == (tmp_path / "pairs-000000.tar").stat().st_size


def test_inspecting_what_was_stopped_before_its_first_shard_says_so(tmp_path):
    ShardIndex(settings={}, num_pairs=4, shards=()).save(tmp_path)
    with pytest.raises(FileFormatError, match="No shard was finished"):
        list(inspect_shards(tmp_path, num=2, out=tmp_path / "sheet.png", verify=False))
    assert not (tmp_path / "sheet.png").exists()
