"""The page around the tabs, and how it is served: this machine only, nothing fetched from or sent to elsewhere."""

import atexit
import os
import shutil
import tempfile

import gradio as gr
from gradio.themes import Default
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.examples import write_examples
from app.pair import pair_tab

MAX_FILE_SIZE = "50mb"
_CACHE_CHECK_S, _CACHE_AGE_S = 600, 3600  # old files of runs are deleted; they can be made again
_MAX_WAITING = 20  # jobs in the queue; who comes later is told to try again
_MAX_SESSIONS = 20  # results kept in memory, some 30 MB each

_FONT = ("system-ui", "sans-serif")
_MONO = ("ui-monospace", "monospace")
_INTRO = (
    "# Lift to Match\nWhere is each pixel of one picture in the other? Give two pictures and press **Match**."
)

_ABOUT = """
- **Your pictures stay on this machine.** By default the app listens on 127.0.0.1; it has no share link and sends no
  telemetry. Files of a run are deleted after about an hour and when the app stops.
- **Pixels** are continuous: the centre of the top-left pixel is (0.5, 0.5) and a picture spans [0, W] x [0, H]. Points
  are (x, y) in pixels of the original picture, upright (EXIF orientation applied). OpenCV counts half a pixel less.
- **match.npz** holds `warp_A_to_B` (H, W, 2), the position in B of every pixel of A in [-1, 1] (x = 2 x_px / W - 1,
  `align_corners=False`), `certainty_A_to_B`, and both for B to A. Read it with `l2m_viz.Match.load`, or with NumPy
  (no pickles). **matches.csv** holds up to 5000 sampled matches in pixels.
- **Certainty** is the matcher's own opinion: predicted by the network of `l2m-tiny`, agreement of both directions for
  `dis`, distance to the nearest keypoint for `sift`. Hatched places are below the threshold: B does not show them, or
  the matcher does not know.
- **A picture that lies on its side** is matched, too: where little of B matches as it is, each quarter turn is tried,
  which takes up to four times as long. All results are for B as it is.
- PNG, JPEG, WebP, BMP, GIF, TIFF and PPM up to 50 MB and 50 million pixels. Browsers show no preview of TIFF.
"""

_CSS = """
.gradio-container { max-width: 1500px !important; }
#numbers table { width: 100%; border-collapse: collapse; }
#numbers table, #numbers tr { border: none; }
#numbers th, #numbers td { border: none; border-bottom: 1px solid var(--border-color-primary); padding: .3em .5em; }
#numbers :is(th, td):nth-child(2) { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
#numbers td:nth-child(3) { opacity: .75; }
#matcher input { text-overflow: ellipsis; padding-right: 1.6em; }
/* Progress covers the old status instead of mixing with it; after an error the message above says it all. */
#status .wrap { background: var(--body-background-fill); opacity: 1; }
#status .wrap:has(.error) { display: none; }
"""

# Nothing but this server, whatever a page or a library would like to load.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


def make_app() -> gr.Blocks:
    """Build the page; its files live in a folder of this process that only this user can read."""
    cache = tempfile.mkdtemp(prefix="l2m_app_")  # mode 0700
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = cache  # read by every component when it is made
    with gr.Blocks(
        title="Lift to Match", delete_cache=(_CACHE_CHECK_S, _CACHE_AGE_S), analytics_enabled=False
    ) as demo:
        gr.Markdown(_INTRO)
        pair_tab(write_examples(cache))
        with gr.Accordion("About: privacy, conventions, files", open=False):
            gr.Markdown(_ABOUT)
    return demo.queue(max_size=_MAX_WAITING, default_concurrency_limit=4)


def launch(host: str = "127.0.0.1", port: int | None = 7860, *, inbrowser: bool = False) -> gr.Blocks:
    """Serve the app from a thread and return at once; without a ``port``, the first free one from 7860 on."""
    demo = make_app()
    demo.launch(
        server_name=host,
        server_port=port,
        inbrowser=inbrowser,
        prevent_thread_lock=True,
        quiet=True,  # its hint how to make a public link is no advice of ours
        share=False,
        run_history=False,
        footer_links=["gradio", "settings"],
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=_MAX_SESSIONS,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(_PolicyHeader)]},
        theme=Default(primary_hue="blue", font=_FONT, font_mono=_MONO),
        css=_CSS,
    )
    return demo


class _PolicyHeader:
    """ASGI middleware: one header on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)
