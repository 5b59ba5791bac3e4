"""Our PLY files in somebody else's viewer: Gradio's Model3D (gsplat.js) in a real browser.

Run as a program (`python -m tests.browser.test_ply_browser --port N FILE...`) it is the page that the test opens.
"""

import io
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from l2m_viz.encoders import FeaturePCA
from l2m_viz.gaussians import Gaussians, write_ply

_WAIT_S = 60
# gsplat.js starts 5 units from the origin, half a radian to the side and half a radian above (y points down), looks at
# the origin, and has a focal length of 1132 px. Gradio cannot change it.
_ANGLE, _DISTANCE, _FOCAL_PX = 0.5, 5.0, 1132.0
_RIGHT = torch.tensor([math.cos(_ANGLE), 0.0, math.sin(_ANGLE)])  # of the screen, in the world
_OFFSETS = (-0.8, 0.0, 0.8)  # of the three Gaussians, along it
_COLORS = ((0.85, 0.1, 0.15), (0.1, 0.6, 0.2), (0.15, 0.25, 0.8))
_SCALES = (0.3, 0.05, 0.05)  # standard deviations, longest along x before the turns:
_STANDS = (math.cos(math.pi / 4), 0.0, 0.0, math.sin(math.pi / 4))  # about z, to the vertical
_LIES = (math.cos(-_ANGLE / 2), 0.0, math.sin(-_ANGLE / 2), 0.0)  # about y, to the screen's right


def three_gaussians(num_features: int, num_rest: int | None) -> Gaussians:
    """Red, green and blue from left to right, with features, names and a basis, and harmonics that are not drawn."""
    generator = torch.Generator().manual_seed(0)
    return Gaussians(
        means=torch.tensor(_OFFSETS)[:, None] * _RIGHT,
        quats=2 * torch.tensor([_STANDS, _LIES, _STANDS]),
        log_scales=torch.tensor(_SCALES).log().expand(3, 3),
        logit_opacities=torch.full((3,), 5.0),
        colors=torch.tensor(_COLORS),
        features=torch.randn(3, num_features, generator=generator),
        sh_rest=None if num_rest is None else torch.zeros(3, num_rest, 3),
        backbone="dinov2-vits14",
        length_unit="relative",
        pca=FeaturePCA.fit(torch.randn(num_features, num_features, generator=generator), 8),
    )


@pytest.mark.parametrize(("num_features", "num_rest"), [(32, 15), (384, None)])
def test_gradio_draws_our_file(serve, page, tmp_path, num_features, num_rest):
    write_ply(three_gaussians(num_features, num_rest), tmp_path / "three.ply")
    page.goto(serve("tests.browser.test_ply_browser", str(tmp_path / "three.ply")))
    canvas = page.locator("canvas")
    canvas.wait_for(timeout=1000 * _WAIT_S)
    picture = drawn(page, canvas)
    height, width, _ = picture.shape
    assert height != width
    centre = (width / 2, height / 2)
    for offset, color in zip(_OFFSETS, _COLORS, strict=True):
        x, y = centre[0] + _FOCAL_PX * offset / _DISTANCE, centre[1]
        shown = picture[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2].mean(axis=(0, 1))
        np.testing.assert_allclose(shown, color, atol=0.04)
        rows, columns = np.nonzero(np.abs(picture - color).max(axis=-1) < 0.15)
        assert (columns.mean(), rows.mean()) == pytest.approx((x, y), abs=3)
        long, short = (columns, rows) if offset == 0 else (rows, columns)
        assert np.ptp(long) > 2.5 * np.ptp(short)
    empty = picture[-20, 20]  # the upper corners have labels
    assert min(np.abs(empty - color).max() for color in _COLORS) > 0.3
    assert (np.abs(picture[height // 8 : -height // 8] - empty).max(axis=-1) > 0.1).mean() < 0.1


def drawn(page, canvas) -> np.ndarray:
    """Pixels of the canvas [h w 3] in [0, 1] when there is something on it that has stopped growing."""
    end, before = time.monotonic() + _WAIT_S, None
    while time.monotonic() < end:
        page.wait_for_timeout(500)
        image = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
        picture = np.asarray(image, np.float32) / 255
        middle = picture[picture.shape[0] // 8 : -picture.shape[0] // 8]  # between the labels
        if before is not None and middle.std(axis=(0, 1)).max() > 0.02 and np.array_equal(picture, before):
            return picture
        before = picture
    pytest.fail(f"after {_WAIT_S} s the canvas is blank, or still changes")


def serve_files(port: int, paths: list[str]) -> None:
    """Show PLY files on a page, until somebody ends the process."""
    import gradio as gr
    from gradio.themes import Default

    with gr.Blocks(analytics_enabled=False) as demo:
        for path in paths:
            gr.Model3D(path, height=500)
    # system fonts: the default ones come from the network
    theme = Default(font=("sans-serif",), font_mono=("monospace",))
    demo.launch(
        server_name="127.0.0.1", server_port=port, quiet=True, theme=theme, ssr_mode=False, share=False
    )


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("paths", nargs="+")
    args = parser.parse_args()
    serve_files(args.port, args.paths)
