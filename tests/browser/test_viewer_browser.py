"""The viewer in a real browser: viser's splats and our rasterizer show the same thing, wherever the visitor looks."""

import base64
import io
import re
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("viser")

from l2m_viz.data import write_image
from l2m_viz.gaussians import pick
from l2m_viz.geometry import Camera, intrinsics, project
from l2m_viz.geometry.scenes import sphere_on_plane
from l2m_viz.photo import FOCAL_OVER_LONG_SIDE
from l2m_viz.show.scene import hatch
from l2m_viz.show.viewer_camera import ViewerCamera, ViewerUnits, camera_from_viewer, standpoint

WH = (320, 240)
SIDE = 32  # cells along the longer side of compared pictures: blurs what two renderers may draw differently
COLOURS, ENCODER = 0, 1  # the panel's menus, from above
HOLE = hatch(48, 48).mean(dim=(0, 1)).numpy()  # the stripes, blurred

_COPY = """image => {
    const copy = document.createElement('canvas');
    [copy.width, copy.height] = [image.naturalWidth, image.naturalHeight];
    copy.getContext('2d').drawImage(image, 0, 0);
    return copy.toDataURL();
}"""


@pytest.fixture
def viewer(serve, page, tmp_path):
    """The viewer of a sphere before a wall, open in a page; nothing is fetched from elsewhere."""
    camera = Camera(intrinsics(FOCAL_OVER_LONG_SIDE * WH[0], (WH[1], WH[0])), torch.eye(4), *WH)
    scene = sphere_on_plane()
    write_image(tmp_path / "photo.png", scene.image(camera, period=1.5))
    np.save(tmp_path / "depth.npy", scene.depth(camera)[0].numpy())
    files = ("--image", f"{tmp_path}/photo.png", "--depth", f"{tmp_path}/depth.npy")
    address = serve(
        "app.viewer", *files, "--max-splats", "10000"
    )  # software WebGL draws them on the processor
    foreign: list[str] = []
    page.on(
        "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else foreign.append(r.url)
    )
    page.set_viewport_size({"width": 720, "height": 420})
    page.goto(address)
    page.locator(
        ".mantine-Notification-closeButton"
    ).first.click()  # "software rendering" would hide the scene
    yield page
    assert not foreign


@pytest.fixture
def lifted(viewer, tmp_path):
    """What that viewer shows: the Gaussians, the photo's camera, and the nearest drawn depth."""
    from app.viewer import ViewerCfg, load

    shown = load(ViewerCfg(image=tmp_path / "photo.png", depth=tmp_path / "depth.npy"))
    return shown.gaussians, shown.camera, shown.near


def test_splats_and_our_rasterizer_agree_while_the_visitor_looks_around(viewer):
    first = standing(viewer)
    viewer.get_by_role("button", name="A", exact=True).click()
    eventually(lambda: standing(viewer) != first, "camera A's whole image, in this window")
    eventually(lambda: agree(viewer), "the splats look like our rasterizer's view of the photo")
    start_text, start = standing(viewer), panel(viewer)
    assert start.std() > 0.1

    viewer.mouse.move(100, 300)
    viewer.mouse.down()
    viewer.mouse.move(115, 305, steps=3)
    viewer.mouse.up()
    eventually(lambda: standing(viewer) != start_text, "another camera, other holes")
    eventually(lambda: agree(viewer), "the splats look like our rasterizer's view from the side")
    eventually(lambda: np.abs(panel(viewer) - start).mean() > 0.03, "the panel shows that side, too")

    viewer.get_by_role("button", name="A", exact=True).click()
    eventually(lambda: np.abs(panel(viewer) - start).mean() < 0.02, "back at camera A")
    viewer.mouse.move(100, 300)
    for _ in range(5):
        viewer.mouse.wheel(0, 500)
        time.sleep(0.3)
    eventually(lambda: drawn(panel(viewer), HOLE) < 0.2, "the scene is small")
    eventually(
        lambda: 0.2 > drawn(canvas(viewer)) > 0.5 * drawn(panel(viewer), HOLE), "its splats are still there"
    )


def test_colours_and_main_view(viewer):
    eventually(lambda: agree(viewer), "the splats are drawn")
    rgb, ours = still(viewer), panel(viewer)
    choose(viewer, COLOURS, "features (PCA)")
    eventually(
        lambda: np.abs(canvas(viewer) - rgb)[center(rgb)].mean() > 0.08, "feature colours on the splats"
    )
    eventually(
        lambda: np.abs(panel(viewer) - ours)[center(ours)].mean() > 0.08, "feature colours in the panel"
    )
    eventually(lambda: agree(viewer, apart=0.06), "the same feature colours in both")
    smooth, ours = still(viewer), panel(viewer)
    choose(viewer, ENCODER, "dense-sift")
    eventually(lambda: np.abs(canvas(viewer) - smooth)[center(rgb)].mean() > 0.08, "other features on them")
    eventually(lambda: np.abs(panel(viewer) - ours)[center(ours)].mean() > 0.08, "and in the panel")
    eventually(lambda: agree(viewer, apart=0.06), "the same colours of its features in both")
    choose(viewer, COLOURS, "depth")
    eventually(lambda: "(red) to" in numbers(viewer), "the colour map's ends are written under the picture")
    eventually(lambda: agree(viewer), "the same depth colours in both")
    choose(viewer, COLOURS, "RGB")
    viewer.get_by_role("checkbox").last.check()
    eventually(lambda: np.abs(canvas(viewer) - HOLE)[-5:].mean() < 0.05, "our view fills the main view")
    eventually(lambda: agree(viewer), "it is the same picture")
    viewer.get_by_role("checkbox").last.uncheck()
    eventually(lambda: np.abs(canvas(viewer) - rgb).mean() < 0.02, "the splats are back")


def test_a_click_takes_a_pixel_apart_and_shows_what_is_alike(viewer, lifted):
    gaussians, camera, near = lifted
    eventually(lambda: agree(viewer), "the splats are drawn")
    before = standing(viewer)
    viewer.get_by_role("button", name="A", exact=True).click()
    eventually(lambda: standing(viewer) != before, "camera A's whole image, in this window")
    eventually(lambda: agree(viewer), "the splats are drawn again")
    rgb, ours = still(viewer), panel(viewer)
    box = viewer.locator("canvas").first.bounding_box()
    wide, high = box["width"], box["height"]
    x, y = round(box["x"] + 0.6 * wide), round(box["y"] + 0.52 * high)
    viewer.mouse.click(x, y)
    eventually(lambda: "make this pixel" in picked_text(viewer), "the table's numbers")

    # The same pixel, in a camera made here.
    units = ViewerUnits.fit(gaussians, camera)
    fov = standpoint(camera, gaussians, units, wide / high).fov
    seen = camera_from_viewer(ViewerCamera((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0), fov, wide / high), units)
    share = (x + 0.5 - box["x"]) / wide, (y + 0.5 - box["y"]) / high  # viser takes the centre of the pixel
    expected = pick(gaussians, seen, (share[0] * seen.width, share[1] * seen.height), near=near)
    text = picked_text(viewer)
    assert text.startswith(f"{len(expected)} Gaussians make this pixel")
    assert f"no. {expected.strongest:,}," in text
    assert float(found(r"depth (\d+\.\d+)", text)) == pytest.approx(expected.depth, abs=0.01)
    assert float(found(r"alpha (\d+\.\d+)", text)) == pytest.approx(expected.alpha, abs=0.01)
    place_px, _ = project(gaussians.means[expected.strongest], seen.K)
    assert (place_px - torch.tensor(share) * torch.tensor([seen.width, seen.height])).norm() < 3

    eventually(lambda: np.abs(canvas(viewer) - rgb)[center(rgb)].mean() > 0.05, "the scene is recoloured")
    eventually(lambda: np.abs(panel(viewer) - ours)[center(ours)].mean() > 0.05, "and so is the panel")
    eventually(lambda: agree(viewer, apart=0.06), "the same similarity in both")
    assert viewer.locator("input[role=combobox]:visible").nth(COLOURS).input_value() == "similarity"
    eventually(lambda: "cosine to the picked feature" in numbers(viewer), "what the colours mean")
    assert table(viewer).std() > 0.1
    row, column = round(y - box["y"]), round(x - box["x"])
    around = window(viewer)[row - 9 : row + 10, column - 9 : column + 10]
    red, green, blue = np.moveaxis(around, -1, 0)
    ball = (red > 0.5) & (green < 0.3) & (blue > 0.3)  # magenta, shaded
    assert ball.sum() > 5
    np.testing.assert_allclose(np.argwhere(ball).mean(axis=0), [9, 9], atol=2)
    assert (red > blue + 0.1)[~ball].mean() > 0.5  # what was clicked is like itself

    similar = still(viewer)
    viewer.mouse.click(box["x"] + box["width"] / 2, box["y"] + 8)
    eventually(lambda: "Nothing there" in picked_text(viewer), "a click beside the scene says so")
    assert np.abs(canvas(viewer) - similar).mean() < 0.01
    viewer.mouse.move(x, y)
    viewer.mouse.down()
    viewer.mouse.move(x - 20, y + 5, steps=4)
    viewer.mouse.up()
    eventually(lambda: np.abs(canvas(viewer) - similar).mean() > 0.02, "a drag turns the scene")
    assert "Nothing there" in picked_text(viewer)  # and picks nothing


def eventually(check: Callable[[], object], what: str, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.5)


def choose(page, menu: int, name: str) -> None:
    page.locator("input[role=combobox]:visible").nth(menu).click()
    page.get_by_role("option", name=name, exact=True).click()


def numbers(page) -> str:
    return page.get_by_text("holes (striped)").locator("xpath=..").inner_text()


def standing(page) -> str:
    """Holes and size in the panel, without the time that they took, once the picture has its full size."""

    def holes_and_size() -> str:
        return numbers(page).rsplit(",", 1)[0]

    eventually(lambda: re.search("640 ×|× 640", holes_and_size()), "full size once the camera stands still")
    return holes_and_size()


def picked_text(page) -> str:
    """What stands under "Pick with a click"."""
    return page.get_by_text(re.compile("Click on the scene|this pixel|Nothing there")).first.inner_text()


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text!r}"
    return match[1]


def window(page) -> np.ndarray:
    """The main view, pixel by pixel."""
    clip = page.locator("canvas").first.bounding_box()
    png = page.screenshot(clip=clip, timeout=180_000)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float32) / 255


def table(page) -> np.ndarray:
    """The bars of the picked pixel."""
    return shown_image(page.locator("img[src^='blob:']").first)


def canvas(page) -> np.ndarray:
    clip = page.locator("canvas").first.bounding_box()
    return small(page.screenshot(clip=clip, timeout=180_000))


def still(page) -> np.ndarray:
    """The main view once it stands: splats that are new fade in."""
    pictures = [canvas(page)]

    def stands() -> bool:
        pictures.append(canvas(page))
        return bool(np.abs(pictures[-1] - pictures[-2]).mean() < 0.002)

    time.sleep(0.5)
    eventually(stands, "the main view stands")
    return pictures[-1]


def panel(page) -> np.ndarray:
    """Our rasterizer's picture, the last of the panel."""
    return shown_image(page.locator("img[src^='blob:']").last)


def shown_image(image) -> np.ndarray:
    """The picture itself, without the page around it."""
    return small(base64.b64decode(image.evaluate(_COPY).split(",")[1]))


def small(png: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    scale = SIDE / max(picture.size)
    wh = (round(picture.width * scale), round(picture.height * scale))
    return np.asarray(picture.resize(wh, Image.Resampling.BOX), np.float32) / 255


def center(picture: np.ndarray) -> tuple[slice, slice]:
    height, width = picture.shape[:2]
    return slice(height // 3, -height // 3), slice(width // 3, -width // 3)


def drawn(picture: np.ndarray, background: np.ndarray | float = 1.0) -> float:
    """Share of the picture that is not background."""
    return float((np.abs(picture - background).max(axis=-1) > 0.12).mean())


def agree(page, apart: float = 1.0) -> bool:
    """Whether main view and panel show the same inside the scene, and would not if one were shifted.

    Colours differ by less than ``apart`` in the mean. (Those of the photo do by more: gaps between its splats are black
    in the panel, and closed in the main view.)
    """
    shown, ours = canvas(page), panel(page)
    if shown.shape != ours.shape:
        return False  # the panel does not have the window's shape yet
    # A cell at the edge of a hole is part stripes in the panel and part white in the main view, whatever is shown.
    holes = np.pad(np.abs(ours - HOLE).max(axis=-1) <= 0.12, 1)
    compared = ~np.any(np.lib.stride_tricks.sliding_window_view(holes, (3, 3)), axis=(2, 3))
    compared[:, [0, 1, -2, -1]] = compared[[0, 1, -2, -1]] = False
    shifts = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    likeness = [correlation(np.roll(shown, shift, axis=(0, 1))[compared], ours[compared]) for shift in shifts]
    alike = likeness[0] > 0.9 and likeness[0] == max(likeness)
    return alike and np.abs(shown - ours)[compared].mean() < apart


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return (
        0.0 if len(a) < 20 or min(a.std(), b.std()) < 0.02 else float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    )
