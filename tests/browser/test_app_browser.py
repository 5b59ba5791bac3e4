"""The pair tab in a real browser: upload, match, look at the pixels, drag, click, download, and do it wrong."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l2m_viz.data import load_sample, write_image
from l2m_viz.geometry import normalized_grid, sample_image, to_pixel
from l2m_viz.matching import Match

_WAIT_MS = 60_000


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two real photos on the disk, with the truth between them."""
    folder, sample = tmp_path_factory.mktemp("pair"), load_sample("motorcycle")
    assert sample.image_B is not None
    write_image(folder / "left.png", sample.image_A)
    write_image(folder / "right.png", sample.image_B)
    return sample, folder / "left.png", folder / "right.png"


@pytest.fixture(scope="module")
def url(serve_once):
    return serve_once("app")


@pytest.fixture
def app(page, url):
    """The open page; a request to anywhere but the app fails the test."""
    strangers = []

    def note(request):
        if not request.url.startswith((url, "data:", "blob:")):
            strangers.append(request.url)

    page.on("request", note)
    page.goto(url)
    page.get_by_role("button", name="Match", exact=True).wait_for(timeout=_WAIT_MS)
    yield page
    assert not strangers


def upload(page, which, path):
    page.set_input_files(f"#image_{which} input[type=file]", path)
    page.wait_for_selector(f"#image_{which} img", timeout=_WAIT_MS, state="attached")


def press_match(page):
    page.get_by_role("button", name="Match", exact=True).click()


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def picture(page, name):
    """Pixels of the file that the browser shows, [h w 3] in [0, 1]."""
    image = page.locator(f"#{name} img").first
    image.wait_for(timeout=_WAIT_MS)
    response = page.request.get(image.evaluate("image => image.src"))
    assert response.ok
    return np.asarray(Image.open(io.BytesIO(response.body())).convert("RGB"), np.float32) / 255


def screenshot(locator):
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"), np.float32) / 255


def wait_for_other_picture(page, name, old_source):
    page.wait_for_function(
        "([name, old]) => document.querySelector(`#${name} img`)?.src != old",
        arg=[name, old_source],
        timeout=_WAIT_MS,
    )


def source(page, name):
    return page.locator(f"#{name} img").first.evaluate("image => image.src")


def number(page, name):
    row = page.locator("#numbers tr").filter(has_text=name).first
    return float(row.locator("td").nth(1).inner_text().split()[0].replace(",", ""))


def test_match_two_uploads_and_look(app, pair, tmp_path):
    sample, left, right = pair
    image_A = sample.image_A.numpy()
    upload(app, "a", left)
    upload(app, "b", right)
    choose_matcher(app, "dis")  # its figures on this pair are known
    press_match(app)
    blended = picture(app, "blend")
    assert blended.shape == image_A.shape
    found = check_downloads(app, sample, tmp_path)
    check_maps(app, image_A)
    check_sliders(app, image_A)
    check_click(app, found)
    check_layout(app)


def choose_example(page, label):
    page.get_by_text(label).click()
    page.wait_for_function(
        "document.querySelectorAll('#image_a img, #image_b img').length == 2", timeout=_WAIT_MS
    )


def test_the_default_matcher_tells_pairs_from_strangers(app):
    """Click an example and press Match, nothing else: two views of one thing, then two photos of nothing alike."""
    assert app.locator("#matcher input").input_value().startswith("l2m-tiny:")
    choose_example(app, "stereo pair, measured truth")
    press_match(app)
    app.locator("#status").get_by_text(re.compile("^Overlap 0")).wait_for(timeout=_WAIT_MS)
    assert number(app, "overlap") > 0.6
    assert number(app, "end-point error") < 1
    open_tab(app, "Maps")
    certain = picture(app, "certainty")
    open_tab(app, "Blend")
    choose_example(app, "two unrelated photos")
    app.locator("#blend").wait_for(state="hidden", timeout=_WAIT_MS)  # no old result beside new pictures
    press_match(app)
    for place in (app.get_by_test_id("toast-body"), app.locator("#status")):
        place.get_by_text("do not seem to show the same thing (overlap 0.0").wait_for(timeout=_WAIT_MS)
    assert number(app, "overlap") < 0.1
    assert picture(app, "blend").std() > 0.1  # the photo still shows through the hatching
    open_tab(app, "Maps")
    doubtful = picture(app, "certainty")
    dark = np.array([68, 1, 84]) / 255  # viridis at 0
    assert np.abs(doubtful - dark).max(axis=-1).mean() < 0.05 < np.abs(certain - dark).max(axis=-1).mean()
    warped = picture(app, "warped")
    hatched = np.isclose(warped, 0.45, atol=0.005).all(-1) | np.isclose(warped, 0.55, atol=0.005).all(-1)
    assert hatched.mean() > 0.95


def choose_matcher(page, name):
    page.locator("#matcher input").click()
    page.get_by_role("option", name=re.compile(f"^{name}:")).click()


def check_downloads(page, sample, folder):
    with page.expect_download(timeout=_WAIT_MS) as download:
        page.locator("#npz").click()
    download.value.save_as(folder / "match.npz")
    found = Match.load(folder / "match.npz")
    hw = (sample.image_A.shape[0], sample.image_A.shape[1])
    warp = sample_image(found.warp_A_to_B, normalized_grid(hw))
    error_px = (to_pixel(warp, hw) - to_pixel(sample.warp_A_to_B, hw)).norm(dim=-1)[
        sample.covisibility_A_to_B
    ]
    assert error_px.median() < 1
    assert number(page, "end-point error") == pytest.approx(error_px.median().item(), abs=0.02)
    assert number(page, "overlap") == pytest.approx(found.overlap, abs=0.01)
    with page.expect_download(timeout=_WAIT_MS) as download:
        page.locator("#csv").click()
    rows = Path(download.value.path()).read_text().splitlines()
    assert rows[0].startswith("x_A_px,y_A_px,x_B_px,y_B_px")
    assert len(rows) - 1 == number(page, "matches")
    return found


def check_maps(page, image_A):
    open_tab(page, "Maps")
    warped, certainty = picture(page, "warped"), picture(page, "certainty")
    hatched = np.isclose(warped, 0.45, atol=0.005).all(-1) | np.isclose(warped, 0.55, atol=0.005).all(-1)
    assert 0.05 < hatched.mean() < 0.4
    assert (
        np.abs(warped - image_A)[~hatched].mean() < 0.03
    )  # B is the same scene, seen and lit a little differently
    assert certainty.shape == image_A.shape
    assert certainty.std() > 0.1
    assert picture(page, "error").std() > 0.05
    shown = screenshot(page.locator("#certainty img").first)  # really on the screen, not just on the server
    assert shown.std() > 0.1
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 50


def check_sliders(page, image_A):
    open_tab(page, "Blend")
    for share, least, most in ((0, 0.0, 0.002), (100, 0.02, 0.3)):
        old = source(page, "blend")
        box = page.locator("#share input[type=number]")
        box.fill(str(share))
        box.press("Enter")
        wait_for_other_picture(page, "blend", old)
        assert least <= np.abs(picture(page, "blend") - image_A).mean() < most
    old = source(page, "blend")
    page.locator("#share input[type=range]").focus()
    page.keyboard.press("ArrowLeft")  # as a hand would
    wait_for_other_picture(page, "blend", old)
    certain = number(page, "certain pixels of A")
    box = page.locator("#threshold input[type=number]")
    box.fill("0.9")
    box.press("Enter")
    page.wait_for_function(
        "old => !document.querySelector('#numbers').innerText.includes(old)", arg="at least 0.5"
    )
    assert number(page, "certain pixels of A") < certain


def check_click(page, found):
    open_tab(page, "Click a pixel")
    image = page.locator("#click_a img").first
    image.wait_for(timeout=_WAIT_MS)
    old, before = source(page, "click_b"), picture(page, "click_b")
    box = image.bounding_box()
    image.click(position={"x": 0.4 * box["width"], "y": 0.75 * box["height"]})
    wait_for_other_picture(page, "click_b", old)
    page.locator("#click_text").get_by_text("→").first.wait_for(timeout=_WAIT_MS)
    text = page.locator("#click_text").inner_text()
    x_A, y_A, x_B, y_B = (
        float(part) for pair in text.split("(")[1:] for part in pair.split(")")[0].split(",")
    )
    height, width = found.hw_A
    assert (x_A, y_A) == pytest.approx((0.4 * width, 0.75 * height), abs=2)  # the window shows it smaller
    expected, _ = found.query(torch.tensor([x_A, y_A]))
    assert (x_B, y_B) == pytest.approx(expected.tolist(), abs=0.06)  # one decimal is shown
    y, x, _ = np.nonzero(np.abs(picture(page, "click_b") - before) > 0.1)
    assert (x.mean(), y.mean()) == pytest.approx((x_B, y_B), abs=3)  # the mark


def check_layout(page):
    for width in (1280, 800):
        page.set_viewport_size({"width": width, "height": 900})
        for tab in ("Blend", "A | B", "Maps", "Matches", "Click a pixel"):
            open_tab(page, tab)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{tab} at {width} px"


def test_a_text_file_is_refused_politely(app, tmp_path):
    fake = tmp_path / "fake.png"
    fake.write_text("no picture at all")
    choose_example(app, "two unrelated photos")
    app.get_by_label("Remove image").last.click()
    with app.expect_response("**/upload*", timeout=_WAIT_MS):
        app.set_input_files("#image_b input[type=file]", fake)
    app.wait_for_timeout(1000)  # the page takes note of the answer
    press_match(app)
    toast = app.get_by_test_id("toast-body")
    toast.wait_for(timeout=_WAIT_MS)
    assert "cannot read image B (fake.png)" in toast.inner_text()
    assert "got text" in toast.inner_text()
    assert not app.locator("#blend img").is_visible()
