"""Streams of pairs: the same under any number of workers, resumable, and hard to stop."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from l2m_viz.data import write_image
from l2m_viz.errors import ImageError, L2MError
from l2m_viz.training import PairCfg, make_pair
from l2m_viz.training.pairs import NoPairError, read_photo
from l2m_viz.training.stream import PairStream

CFG = PairCfg(hw=(24, 32), holes="background", p_fill=0.8, difficulty=0.5)


def _write_photo(path, seed: int) -> None:
    rough = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(rough, (60, 90), mode="bicubic").clamp(0, 1)
    write_image(path, smooth[0].permute(1, 2, 0).contiguous())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five photos, one of them in a subfolder, and what is no photo."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("d.jpg", "b.png", "sub/a.jpeg", "c.JPG", "e.png")):
        _write_photo((folder / name).with_suffix((folder / name).suffix.lower()), seed)
    (folder / "c.jpg").rename(folder / "c.JPG")
    (folder / "readme.txt").write_text("not a photo")
    (folder / ".hidden.jpg").write_text("nor this")
    return folder


def _tensors(batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def _assert_same(batches, others) -> None:
    for one, other in zip(batches, others, strict=True):
        assert (one.photos, one.backgrounds, one.index) == (other.photos, other.backgrounds, other.index)
        for name, value in _tensors(one).items():
            assert torch.equal(value, _tensors(other)[name]), name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.filterwarnings("ignore:PairStream skips")
def test_any_number_of_workers_makes_the_same_batches(folder):
    """A function that cannot travel to other processes decides the difficulty; a file is damaged."""
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")

    def stream(workers: int) -> PairStream:
        return PairStream(
            folder,
            CFG,
            batch_size=3,
            seed=5,
            num_workers=workers,
            length=4,
            difficulty=lambda i: 0.1 * (i % 8),
        )

    try:
        expected = list(stream(0))
        for workers in (1, 2, 3):
            found = stream(workers)
            _assert_same(expected, list(found))
            assert list(found.skipped) == ["broken.jpg"]
    finally:
        (folder / "broken.jpg").unlink()
    assert expected[1].difficulties.tolist() == [0.1 * i for i in (3, 4, 5)]


def test_a_stream_goes_on_where_it_was_left(folder):
    whole = list(PairStream(folder, CFG, batch_size=2, seed=1, length=4))
    rest = PairStream(folder, CFG, batch_size=2, seed=1, start=whole[1].next_index, length=2)
    _assert_same(whole[2:], list(rest))
    _assert_same(whole[2:], list(rest))  # and every iteration starts anew


def test_processes_share_batches_without_gap_or_overlap(folder):
    whole = list(PairStream(folder, CFG, batch_size=4, seed=1, length=2))
    shares = [
        list(PairStream(folder, CFG, batch_size=2, seed=1, start=start, stride=4, length=2))
        for start in (0, 2)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        for name, value in _tensors(batch).items():
            assert torch.equal(value, torch.cat([_tensors(part)[name] for part in parts])), name


def test_a_pair_can_be_made_again_in_two_ways(folder):
    stream = PairStream(folder, CFG, batch_size=4, seed=2, length=2, difficulty=(0.1, 0.9))
    batch = list(stream)[1]
    for k in range(4):
        cfg = PairCfg(hw=CFG.hw, holes="background", p_fill=0.8, difficulty=batch.difficulties[k].item())
        image, background = (
            read_photo(folder / name, cfg) for name in (batch.photos[k], batch.backgrounds[k])
        )
        by_hand = make_pair(image, cfg, seed=int(batch.seeds[k]), background=background)
        by_number = stream.pair(batch.index + k)
        assert by_number.photo == batch.photos[k] and by_number.background == batch.backgrounds[k]
        for pair in (by_hand, by_number.pair):
            for name, value in _tensors(pair).items():
                assert torch.equal(value, getattr(batch, name)[k]), name
        assert 0.1 <= batch.difficulties[k] <= 0.9
    assert len(set(batch.difficulties.tolist())) == 4


def test_each_pass_shows_every_photo_once_in_another_order(folder):
    stream = PairStream(folder, CFG, batch_size=5, length=4)
    assert stream.photos == ("b.png", "c.JPG", "d.jpg", "e.png", "sub/a.jpeg")
    passes = [batch.photos for batch in stream]
    assert all(sorted(photos) == list(stream.photos) for photos in passes)
    assert len(set(passes)) > 1
    assert all(a != b for batch in stream for a, b in zip(batch.photos, batch.backgrounds, strict=True))
    others = [batch.photos for batch in PairStream(folder, CFG, batch_size=5, length=4, seed=1)]
    assert others != passes


def test_unreadable_photos_are_skipped_with_one_counted_warning_each(tmp_path):
    for seed in range(3):
        _write_photo(tmp_path / f"{seed}.png", seed)
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").touch()
    stream = PairStream(tmp_path, CFG, batch_size=5, length=4)
    with pytest.warns(UserWarning, match="PairStream skips") as warned:
        batches = list(stream)
    messages = sorted(str(warning.message) for warning in warned)
    assert len(messages) == 2 and {*stream.skipped} == {"text.jpg", "empty.png"}
    assert any("text.jpg" in m for m in messages) and any("an empty file" in m for m in messages)
    assert any("number 1 of 5" in m for m in messages) and any("number 2 of 5" in m for m in messages)
    used = {name for batch in batches for name in (*batch.photos, *batch.backgrounds)}
    assert used == {"0.png", "1.png", "2.png"} and [batch.next_index for batch in batches] == [5, 10, 15, 20]


@pytest.mark.filterwarnings("ignore:PairStream skips")
def test_a_folder_without_use_says_why(tmp_path, folder):
    with pytest.raises(ImageError, match="no such folder"):
        PairStream(tmp_path / "absent", batch_size=1)
    with pytest.raises(ImageError, match="no photo"):
        PairStream(tmp_path, batch_size=1)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(ImageError, match=r"a readable one, got 2 that are not, among them [ab].jpg"):
        next(iter(PairStream(tmp_path, batch_size=1)))
    _write_photo(tmp_path / "c.png", 0)
    with pytest.raises(ImageError, match=r"a second readable one, got only c.png"):
        next(iter(PairStream(tmp_path, CFG, batch_size=1)))
    assert next(iter(PairStream(tmp_path, PairCfg(hw=(24, 32)), batch_size=1))).photos == ("c.png",)


def test_a_single_photo_has_no_background(tmp_path):
    _write_photo(tmp_path / "a.png", 0)
    with pytest.raises(L2MError, match="at least 2 photos"):
        PairStream(tmp_path, CFG, batch_size=1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:PairStream skips")
def test_settings_that_allow_no_pair_end_the_stream_with_their_own_error(folder, workers):
    cfg = PairCfg(hw=(24, 32), min_overlap=1.1)
    with pytest.raises(NoPairError, match=r"^make_pair overlap: expected at least 1\.1"):
        next(iter(PairStream(folder, cfg, batch_size=1, num_workers=workers)))
    wrong = PairStream(folder, batch_size=1, num_workers=workers, difficulty=lambda _: -1.0)
    with pytest.raises(L2MError, match=r"^PairCfg difficulty"):
        next(iter(wrong))


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"seed": -1}, {"num_workers": -1}, {"start": -1}, {"length": -1}]
)
def test_numbers_out_of_range_are_refused(folder, settings):
    with pytest.raises(L2MError, match=f"PairStream {next(iter(settings))}: expected at least"):
        PairStream(folder, CFG, **({"batch_size": 1} | settings))


def test_a_killed_worker_ends_the_stream_with_a_clear_error(folder):
    stream = iter(PairStream(folder, CFG, batch_size=2, num_workers=1))
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(L2MError, match=r"^PairStream: a worker process ended.* take fewer workers"):
        for _ in range(100):  # what was made ahead still comes
            next(stream)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError("socket")]
)
def test_a_worker_killed_while_it_hands_a_batch_over_ends_the_stream_with_the_same_error(
    folder, monkeypatch, error
):
    """The loader has not noticed yet: what is seen is the broken connection through which memory travels."""

    def broken(*_, **__):
        raise error
        yield

    monkeypatch.setattr("l2m_viz.training.stream.DataLoader", broken)
    with pytest.raises(L2MError, match=r"^PairStream: a worker process ended"):
        next(iter(PairStream(folder, CFG, batch_size=2, num_workers=1)))
    with pytest.raises(
        type(error)
    ):  # without a worker nothing can be handed over: another fault, not to be hidden
        next(iter(PairStream(folder, CFG, batch_size=2)))


def _brighter(batch):
    return replace(batch, image_A=1 - batch.image_A, depth_B=2 * batch.depth_B)


def _no_file(batch):
    raise FileNotFoundError("no such table")


def _refused(batch):
    raise NoPairError("finish: this batch is not wanted")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_when_a_batch_is_finished_keeps_its_name(folder, workers):
    with pytest.raises(NoPairError, match=r"^finish: this batch is not wanted$"):
        next(iter(PairStream(folder, CFG, batch_size=1, num_workers=workers, finish=_refused)))
    with pytest.raises(FileNotFoundError, match=r"no such table"):
        next(iter(PairStream(folder, CFG, batch_size=1, num_workers=workers, finish=_no_file)))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux lists them")
@pytest.mark.parametrize("finish", [None, _brighter])
def test_many_batches_can_be_kept(folder, finish):
    """Shared memory is an open file each; a list of batches must not run into the limit of 1024."""
    stream = iter(PairStream(folder, CFG, batch_size=1, num_workers=1, finish=finish))
    kept = [next(stream)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept += [next(stream) for _ in range(20)]
    after = len(list(Path("/proc/self/fd").iterdir()))
    stream.close()
    assert after - before <= 20 + 4
    _assert_same(kept, list(PairStream(folder, CFG, batch_size=1, length=21, finish=finish)))


def test_a_stream_leaves_no_process_and_no_trace_in_the_global_generator(folder):
    before = torch.random.get_rng_state()
    stream = iter(PairStream(folder, CFG, batch_size=1, num_workers=2))
    next(stream)
    stream.close()
    assert torch.equal(before, torch.random.get_rng_state())
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
