"""The app as its users and its strangers meet it: over HTTP, with files."""

import contextlib
import csv
import io
import math
import os
import socket
import stat
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from gradio.analytics import analytics_enabled
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from app import pair, server, work
from app.examples import find_truth, turned, write_examples
from l2m_viz.data import load_sample, read_image, write_image
from l2m_viz.geometry import pixel_grid, sample_image, to_pixel
from l2m_viz.matching import Match

FLOW_PX = (12.0, 5.0)  # from A to B
HW_A, HW_B = (200, 260), (190, 240)
OUTPUTS = [  # in the order of `app.pair._Outputs`, without the column, which has no value
    "status", "blended", "slider", "warped", "certainty", "error", "error_legend", "lines",
    "click_A", "click_B", "click_text", "table", "npz", "csv",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def url(cache):
    """The app in a process of its own, as users start it; told to end, it leaves no file behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "app", "--port", str(port)]
    root = Path(server.__file__).parents[1]
    log = (cache.parent / "app.log").open("wb")
    with (
        log,
        subprocess.Popen(command, cwd=root, env={**os.environ, "TMPDIR": str(cache)}, stdout=log) as process,
    ):
        try:
            wait_for(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
        assert process.wait(30) == 0
    assert not list(cache.glob("l2m_app_*"))


def wait_for(port, process, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.2)
    pytest.fail(f"the app does not answer; exit code {process.poll()}")


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    client = Client(url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """Two crops of one photo: the point (x, y) of A is at (x + 12, y + 5) in B."""
    folder = tmp_path_factory.mktemp("shifted")
    photo = load_sample("astronaut").image_A
    write_image(folder / "a.png", photo[20 : 20 + HW_A[0], 30 : 30 + HW_A[1]])
    write_image(folder / "b.png", photo[15 : 15 + HW_B[0], 18 : 18 + HW_B[1]])
    return folder / "a.png", folder / "b.png"


def match(client, path_A, path_B, matcher="l2m-tiny"):
    files = [handle_file(path) if path else None for path in (path_A, path_B)]
    return dict(zip(OUTPUTS, client.predict(*files, matcher, 50, 0.5, api_name="/match"), strict=False))


@pytest.fixture(scope="module")
def answer(client, shifted):
    return match(client, *shifted, "dis")  # exact to a tenth of a pixel where things hardly move


def rgb(path):
    return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255


# --- the right answer ------------------------------------------------------------------------------------


def test_npz_holds_the_known_shift(answer):
    found = Match.load(answer["npz"]["value"])
    assert (found.hw_A, found.hw_B) == (HW_A, HW_B)
    inner = pixel_grid(HW_A)[20:-40:7, 20:-60:7]
    points_B, certainty = found.query(inner)
    error_px = (points_B - inner - torch.tensor(FLOW_PX)).norm(dim=-1)
    assert error_px.median() < 0.1
    assert (error_px < 1).float().mean() > 0.95
    assert certainty.median() > 0.8


def test_l2m_tiny_is_chosen_unless_the_visitor_chooses(client):
    (matcher,) = (part["props"] for part in client.config["components"] if part["type"] == "dropdown")
    assert matcher["value"] == pair.DEFAULT_MATCHER == "l2m-tiny"
    assert [name for _, name in matcher["choices"]][:3] == ["l2m-tiny", "dis", "sift"]


def stored(image, how):
    """A picture as it may come, and where its pixels are in the original: p = offset + p' / scale."""
    if how == "grey with alpha":
        opaque = Image.new("L", image.size, 255)
        opaque.paste(0, (0, 0, 30, 30))
        return Image.merge("LA", (image.convert("L"), opaque)), (0, 0), 1
    if how == "12 million pixels":
        return image.resize((15 * image.width, 15 * image.height), Image.Resampling.BICUBIC), (0, 0), 15
    return image.crop((50, 0, 210, image.height)), (50, 0), 1  # portrait; B is landscape


@pytest.mark.parametrize("how", ["grey with alpha", "12 million pixels", "portrait"])
def test_l2m_tiny_finds_the_known_shift_in_any_picture(client, shifted, tmp_path, how):
    picture, offset, scale = stored(Image.open(shifted[0]), how)
    picture.save(tmp_path / "a.png", compress_level=1)
    answer = match(client, tmp_path / "a.png", shifted[1])
    assert answer["status"].startswith("Overlap **0.")
    found = Match.load(answer["npz"]["value"])
    assert found.hw_A == (picture.height, picture.width)
    inner = pixel_grid(HW_A)[30:-40:7, 80:-80:7]  # of the original, within all of the three
    points_B, certainty = found.query((inner - torch.tensor(offset)) * scale)
    error_px = (points_B - inner - torch.tensor(FLOW_PX)).norm(dim=-1)
    assert error_px.median() < 1
    assert (error_px < 3).float().mean() > 0.9
    assert certainty.median() > 0.6


def test_a_picture_that_lies_on_its_side_is_matched(client, shifted, tmp_path):
    lying = Image.open(shifted[1]).transpose(
        Image.Transpose.ROTATE_90
    )  # counter-clockwise: (x, y) to (y, W - x)
    lying.save(tmp_path / "b.png")
    answer = match(client, shifted[0], tmp_path / "b.png")
    assert "B was turned by 270°" in answer["status"]
    found = Match.load(answer["npz"]["value"])
    assert found.hw_B == (lying.height, lying.width)
    inner = pixel_grid(HW_A)[30:-40:7, 80:-80:7]
    points_B, certainty = found.query(inner)
    x, y = (inner + torch.tensor(FLOW_PX)).unbind(-1)
    error_px = (points_B - torch.stack([y, HW_B[1] - x], dim=-1)).norm(dim=-1)
    assert error_px.median() < 1
    assert certainty.median() > 0.6


def test_csv_holds_the_known_shift_in_pixels(answer):
    rows = list(csv.DictReader(Path(answer["csv"]["value"]).read_text().splitlines()))
    assert len(rows) == work.NUM_MATCHES
    shift = np.array(
        [[float(r["x_B_px"]) - float(r["x_A_px"]), float(r["y_B_px"]) - float(r["y_A_px"])] for r in rows]
    )
    assert np.median(shift, axis=0) == pytest.approx(FLOW_PX, abs=0.1)


def test_warped_b_resembles_a(answer, shifted):
    image_A, warped, blended = rgb(shifted[0]), rgb(answer["warped"]), rgb(answer["blended"])
    assert warped.shape == image_A.shape == (*HW_A, 3)
    inside = np.s_[10:-30, 10:-50]
    assert np.abs(warped - image_A)[inside].mean() < 0.02
    assert np.abs(blended - (warped + image_A) / 2).max() < 2 / 255


def test_numbers_name_sizes_and_units(answer):
    table = answer["table"]
    assert "| size of A | 260 x 200 px |" in table
    assert "| size of B | 240 x 190 px |" in table
    assert "| cycle error | 0.0" in table
    assert "end-point error" not in table  # nobody knows the truth of an upload
    assert answer["status"].startswith("Overlap **0.")


def test_unrelated_photos_are_said_to_be_unrelated(client, tmp_path):
    for name in ("chelsea", "rocket"):
        write_image(tmp_path / f"{name}.png", load_sample(name).image_A[:250, :300])
    for matcher in ("l2m-tiny", "dis", "sift"):
        answer = match(client, tmp_path / "chelsea.png", tmp_path / "rocket.png", matcher)
        assert "do not seem to show the same thing (overlap 0.0" in answer["status"]
        assert " none px" not in answer["table"]


@pytest.mark.parametrize(
    ("matcher", "most_px"), [("l2m-tiny", 1), ("sift", 4)]
)  # sift: off between keypoints
def test_example_shows_its_errors(client, tmp_path, matcher, most_px):
    examples = write_examples(tmp_path)
    table = match(client, examples[1].path_A, examples[1].path_B, matcher)["table"]
    error_px = float(table.split("| end-point error | ")[1].split()[0])
    assert error_px < most_px
    assert "| PCK@5 |" in table


def test_click_answers_in_pixels_of_the_originals(tmp_path):
    """A is 1200x1800 and shown at half size; the match doubles nothing and moves by (30, -20)."""
    hw = (1200, 1800)
    warp = torch.stack(
        [2 * (pixel_grid(hw)[..., 0] + 30) / 1800 - 1, 2 * (pixel_grid(hw)[..., 1] - 20) / 1200 - 1], -1
    )
    known = Match(warp, torch.ones(hw), warp, torch.ones(hw), hw, hw)
    view = work.view_pair(torch.zeros(*hw, 3), torch.zeros(*hw, 3), known)
    assert view.image_A.shape == (600, 900, 3)
    result = work.PairResult(view, known, 0, known.sample(0), 0.0, None, {}, tmp_path)
    marked_A, marked_B, text = pair._on_click(result, cast(gr.SelectData, SimpleNamespace(index=[100, 200])))
    assert "A **(200.0, 400.0)** px → B **(230.0, 380.0)** px, certainty **1.00**" in text
    for marked, point in ((marked_A, (100, 200)), (marked_B, (115, 190))):
        y, x = np.nonzero(rgb(marked).sum(-1) > 0)
        assert ((x + 0.5).mean(), (y + 0.5).mean()) == pytest.approx(point, abs=0.6)


def test_a_long_drag_does_not_fill_the_disk(tmp_path):
    known = Match(
        torch.zeros(9, 16, 2), torch.ones(9, 16), torch.zeros(9, 16, 2), torch.ones(9, 16), (9, 16), (9, 16)
    )
    view = work.view_pair(torch.zeros(9, 16, 3), torch.ones(9, 16, 3), known)
    result = work.PairResult(view, known, 0, known.sample(0), 0.0, None, {}, tmp_path)
    for share in range(30):
        path = Path(pair._on_blend(result, share, 0.5))
        assert rgb(path) == pytest.approx(share / 100, abs=1 / 255)
    assert len(list(tmp_path.glob("*.png"))) <= 5


def test_truth_of_the_turned_example():
    photo = load_sample("astronaut").image_A
    image_B, truth = turned(photo)
    hw_B = image_B.shape[0], image_B.shape[1]
    points_B = to_pixel(truth.warp, hw_B)
    angle = math.radians(12)
    right_of_center = points_B[255:257, 355:357].mean(
        (0, 1)
    )  # the point (356, 256): 100 px right of the centre
    expected = torch.tensor([210 + 0.9 * 100 * math.cos(angle), 180 + 0.9 * 100 * math.sin(angle)])
    torch.testing.assert_close(right_of_center, expected, atol=1e-3, rtol=0)
    back = sample_image(image_B, truth.warp)  # resampled twice: a little blurred
    assert (back - photo)[truth.covisible].abs().mean() < 0.03


def test_truth_is_found_by_pixels_not_by_name(tmp_path):
    examples = write_examples(tmp_path)
    stereo = load_sample("motorcycle")
    assert stereo.image_B is not None
    assert find_truth(examples, stereo.image_A, stereo.image_B) is examples[0].truth
    assert find_truth(examples, stereo.image_B, stereo.image_A) is None


# --- friendly errors -------------------------------------------------------------------------------------


def png_of_size(width, height):
    """A few bytes that announce a huge picture."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def whole_jpeg():
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


BAD_FILES = {
    "truncated": ("photo.jpg", lambda: whole_jpeg()[:2000], "truncated"),
    "text": ("photo.png", lambda: b"these are words, not pixels", "got text"),
    "empty": ("photo.png", lambda: b"", "got an empty file"),
    "bomb": ("photo.png", lambda: png_of_size(60000, 60000), "50 million pixels, got 60000x60000"),
    "one pixel": ("photo.png", lambda: png_bytes(1, 1), "at least 16x16 px, got 1x1 px"),
    "strip": ("photo.png", lambda: png_bytes(400, 15), "at least 16x16 px, got 400x15 px"),
}


def png_bytes(width, height):
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_explained(client, shifted, tmp_path, kind):
    name, data, message = BAD_FILES[kind]
    (tmp_path / name).write_bytes(data())
    with pytest.raises(AppError, match=message) as caught:
        match(client, shifted[0], tmp_path / name)
    assert "/tmp" not in str(caught.value)  # where the server keeps it is nobody's business
    assert f"image B ({name})" in str(caught.value)


def test_missing_image_is_explained(client, shifted):
    with pytest.raises(AppError, match=r"image B is missing.*Upload one as image B"):
        match(client, shifted[0], None)


def test_markup_in_a_file_name_is_shown_as_text():
    with pytest.raises(gr.Error, match="&lt;img src=x&gt;"), work.friendly_errors():
        raise work.L2MError("image A (<img src=x>)")


def test_a_bug_is_called_a_bug_and_keeps_its_secrets(capsys):
    with pytest.raises(gr.Error, match="Unexpected KeyError") as caught, work.friendly_errors():
        raise KeyError("/secret/path")
    assert "secret" not in str(caught.value)
    assert "/secret/path" in capsys.readouterr().err  # the log has it


def test_forgotten_result_is_explained():
    with pytest.raises(gr.Error, match="Press Match"):
        pair._on_blend(None, 50, 0.5)


def test_exif_rotation_is_applied_before_matching(client, shifted, tmp_path):
    """A phone's portrait photo: stored lying, shown standing."""
    image = Image.open(shifted[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    answer = match(client, tmp_path / "phone.png", shifted[1])
    assert Match.load(answer["npz"]["value"]).hw_A == HW_A
    assert torch.equal(read_image(tmp_path / "phone.png"), read_image(shifted[0]))


# --- safe by default -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "pyproject.toml", str(Path(server.__file__).resolve())]
)
def test_files_of_the_machine_are_not_served(url, path):
    assert httpx.get(f"{url}/gradio_api/file={path}").status_code in (403, 404)


def test_a_path_is_no_upload(url, shifted):
    """A client that names a file of the server instead of uploading one is refused."""
    payload = {"path": str(shifted[0]), "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{url}/gradio_api/call/match", json={"data": [payload, payload, "dis", 50, 0.5]})
    stream = httpx.get(f"{url}/gradio_api/call/match/{call.json()['event_id']}", timeout=60).text
    assert "event: error" in stream
    assert "Overlap" not in stream


def test_upload_over_the_limit_is_refused(url):
    files = {"files": ("big.png", b"\0" * (51 * 2**20))}
    assert httpx.post(f"{url}/gradio_api/upload", files=files, timeout=60).status_code == 413


def test_listens_here_only_and_talks_to_nobody(url, client):
    assert not analytics_enabled()
    for *_, where in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET):
        address = str(where[0])
        if not address.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((address, int(url.rsplit(":")[-1])), timeout=1).close()
    policy = httpx.get(url).headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert not client.config["run_history"]


def test_temporary_folder_is_private(answer, cache):
    (folder,) = cache.glob("l2m_app_*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.glob("*/match.npz"))
