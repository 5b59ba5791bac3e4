"""The viewer's own parts: what it loads, how its drawing thread behaves, how it starts and ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("viser")

from app import viewer
from app.viewer import Painter, ViewerCfg
from l2m_viz.data import write_image
from l2m_viz.gaussians import Gaussians, Picked
from l2m_viz.geometry import Camera, intrinsics
from l2m_viz.show.scene import NovelView

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    write_image(path, torch.rand(60, 80, 3, generator=torch.Generator().manual_seed(0)))
    return path


@pytest.fixture
def gaussians_of_two() -> dict[str, Gaussians]:
    """The same twenty Gaussians with features of two encoders."""
    generator = torch.Generator().manual_seed(1)
    means, quats = torch.rand(20, 3, generator=generator), torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(20, 1)
    bare = Gaussians.from_activated(means, quats, 0.1 + means, torch.full((20,), 0.5), means)
    features = {name: torch.randn(20, 4, generator=generator) for name in ("one", "two")}
    return {name: replace(bare, features=some) for name, some in features.items()}


def _start(*args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "app.viewer", *args]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def test_listens_on_this_machine_only_by_default():
    assert ViewerCfg().host == "127.0.0.1"


def test_one_line_says_the_address_and_ctrl_c_ends_it_cleanly(photo):
    server = _start("--image", str(photo), "--port", "0")
    assert server.stdout is not None
    first = server.stdout.readline()
    assert first.startswith("viewer: http://127.0.0.1:"), server.communicate(timeout=30)
    server.send_signal(signal.SIGINT)
    out, err = server.communicate(timeout=30)
    assert out.splitlines() == ["viewer stopped"]
    assert "Traceback" not in err
    assert server.returncode == 0


def test_what_cannot_be_read_is_one_line_and_an_exit_code(tmp_path):
    server = _start("--image", str(tmp_path / "nothing.png"))
    out, err = server.communicate(timeout=120)
    assert server.returncode == 2
    assert out == ""
    assert err.startswith("viewer: ")
    assert "nothing.png" in err
    assert len(err.splitlines()) == 1


def test_stereo_sample_is_shown_with_both_real_photos():
    shown = viewer.load(ViewerCfg())
    assert list(shown.pictures) == ["A", "B"]
    assert shown.title.startswith("**motorcycle**: 343,274 Gaussians, depth 2.11 to 5.02 m, measured")
    assert shown.camera.center.tolist() == [0, 0, 0]
    assert shown.pictures["B"][0].center[0].item() == pytest.approx(0.193, abs=1e-3)
    assert list(shown.told_by) == ["l2m-tiny", "l2m-tiny-2d", "dense-sift"]
    assert shown.gaussians.backbone == "l2m-tiny"


def test_the_encoder_that_was_asked_for_comes_first_and_two_share_a_basis(photo):
    shown = viewer.load(ViewerCfg(image=photo, encoder="dense-sift"))
    assert list(shown.told_by) == ["dense-sift", "l2m-tiny", "l2m-tiny-2d"]
    assert shown.gaussians.backbone == "dense-sift"
    bases = {name: gaussians.pca for name, gaussians in shown.told_by.items()}
    assert torch.equal(bases["l2m-tiny"].components, bases["l2m-tiny-2d"].components)
    assert bases["dense-sift"].components.shape != bases["l2m-tiny"].components.shape


def test_single_photo_gets_a_second_view_of_the_lifted_scene(photo):
    shown = viewer.load(ViewerCfg(image=photo, max_side=64))
    camera, image = shown.pictures["B"]
    assert camera.hw == tuple(image.shape[:2]) == (48, 64)
    assert camera.center.norm() > 0
    assert "(relative), prior" in shown.title


class _Log:
    """Records what a Painter does, and lets the test wait for it."""

    def __init__(self, *, fail_first: bool = False) -> None:
        self.sizes: list[int] = []
        self.errors: list[Exception] = []
        self.fail = fail_first

    def paint(self, long_side: int) -> None:
        self.sizes.append(long_side)
        if self.fail:
            self.fail = False
            raise ValueError("no such thing")

    def wait_for(self, num: int, seconds: float = 10) -> list[int]:
        end = time.monotonic() + seconds
        while len(self.sizes) < num and time.monotonic() < end:
            time.sleep(0.01)
        return self.sizes


@pytest.fixture
def painting():
    painters: list[Painter] = []

    def start(log: _Log) -> Painter:
        painter = Painter(log.paint, log.errors.append)
        painters.append(painter)
        painter.start()
        return painter

    yield start
    for painter in painters:
        painter.stop()
        painter.join(10)
        assert not painter.is_alive()


def test_painter_draws_a_draft_then_once_the_full_picture(painting):
    log = _Log()
    painter = painting(log)
    painter.ask()
    assert log.wait_for(2) == [viewer._DRAFT_PX, viewer._FULL_PX]
    time.sleep(2 * viewer._STILL_S)
    assert len(log.sizes) == 2  # nothing moves: nothing is drawn


def test_painter_stays_with_drafts_while_the_camera_moves(painting):
    log = _Log()
    painter = painting(log)
    end = time.monotonic() + 3 * viewer._STILL_S
    while time.monotonic() < end:
        painter.ask()
        time.sleep(0.02)
    moving = len(log.sizes)
    assert moving > 1
    assert log.sizes.count(viewer._FULL_PX) == 0
    assert log.wait_for(moving + 1)[-1] == viewer._FULL_PX


def test_questions_during_a_paint_are_answered_by_one_paint():
    log, gate = _Log(), threading.Event()

    def paint_slowly(long_side: int) -> None:
        log.paint(long_side)
        gate.wait(10)

    painter = Painter(paint_slowly, log.errors.append)
    painter.start()
    painter.ask()
    log.wait_for(1)
    for _ in range(100):
        painter.ask()
    gate.set()
    assert log.wait_for(3) == [viewer._DRAFT_PX, viewer._DRAFT_PX, viewer._FULL_PX]
    painter.stop()
    painter.join(10)


def test_painter_survives_an_exception_and_tells_of_it(painting):
    log = _Log(fail_first=True)
    painter = painting(log)
    painter.ask()
    assert log.wait_for(2) == [viewer._DRAFT_PX, viewer._FULL_PX]
    assert [str(error) for error in log.errors] == ["no such thing"]


def test_line_under_the_picture_has_numbers_with_units():
    hole = torch.zeros(30, 40, dtype=torch.bool)
    hole[:, :10] = True
    view = NovelView(torch.zeros(30, 40, 3), torch.ones(30, 40), hole, (1.5, 4.25))
    camera = Camera(intrinsics(40.0, (30, 40)), torch.eye(4), width=40, height=30)
    assert viewer._describe(view, camera, 12.4, "rgb", "m") == "holes (striped) 25.0%, 40 × 30 px, 12 ms"
    assert "1.50 m (red) to 4.25 m (blue)" in viewer._describe(view, camera, 12.4, "depth", "m")
    similarity = viewer._describe(view, camera, 12.4, "similarity", "m")
    assert similarity.endswith("cosine to the picked feature: 1 red, 0 light grey, −1 blue")


def test_words_about_a_picked_pixel_have_numbers_with_units():
    alphas, before = torch.tensor([0.25, 0.8]), torch.tensor([1.0, 0.75])
    depths, colors = torch.tensor([1.5, 2.0]), torch.rand(2, 3)
    picked = Picked(torch.tensor([7, 12345]), alphas, before, depths, colors, None)
    assert viewer._describe_pick(picked, "m") == (
        "2 Gaussians make this pixel: depth 1.85 m, alpha 0.850. The strongest, no. 12,345, gives 60% from 2.00 m."
    )
    alone = Picked(torch.tensor([7]), alphas[:1], before[:1], depths[:1], colors[:1], None)
    assert viewer._describe_pick(alone, "(relative)").startswith(
        "One Gaussian makes this pixel: depth 1.50 (relative)"
    )


def _sitting(told_by, colours):
    """A visitor without a browser, who looks at ``colours`` of the first encoder."""
    recoloured: list[str] = []
    visitor = viewer.Visitor.__new__(viewer.Visitor)
    visitor.shown = SimpleNamespace(told_by=told_by)
    visitor._encoder, visitor._colors = SimpleNamespace(value="one"), SimpleNamespace(value=colours)
    visitor._picked = visitor._similarity = None
    visitor._turn = threading.Lock()
    visitor._recolor = lambda: recoloured.append(visitor._encoder.value)
    return visitor, recoloured


def test_another_encoder_says_anew_what_is_like_the_picked_pixel(gaussians_of_two):
    visitor, recoloured = _sitting(gaussians_of_two, "similarity")
    weights = torch.tensor([0.25, 0.5])
    visitor._picked = Picked(torch.tensor([7, 3]), weights, torch.ones(2), weights, torch.rand(2, 3), None)
    for name, gaussians in gaussians_of_two.items():
        visitor._encoder.value = name
        visitor._ask_encoder()
        asked = 0.25 * gaussians.features[7] + 0.5 * gaussians.features[3]
        expected = torch.cosine_similarity(gaussians.features, asked[None])
        torch.testing.assert_close(visitor._similarity, expected)
    assert recoloured == ["one", "two"]


def test_another_encoder_is_shown_at_once(gaussians_of_two):
    visitor, recoloured = _sitting(gaussians_of_two, "RGB")
    visitor._encoder.value = "two"
    visitor._ask_encoder()
    assert visitor._colors.value == "features (PCA)"  # which recolours, in a browser
    visitor._ask_encoder()
    assert recoloured == ["two"]


def test_a_cameras_picture_is_a_way_to_it_only_while_nobody_picks():
    """Who stands at a camera has its picture, unseen, before everything that there is to pick."""
    flights: list[str] = []
    visitor = SimpleNamespace(_picking=SimpleNamespace(value=True), go_to=flights.append)
    viewer.Visitor._click_picture(visitor, "A")
    assert flights == []
    visitor._picking.value = False
    viewer.Visitor._click_picture(visitor, "A")
    assert flights == ["A"]
