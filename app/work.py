"""What a button of the pair tab makes the core do: one slow step whose result is kept, and cheap ones that read it."""

import math
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

import gradio as gr
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from app.examples import Example, Truth, find_truth
from l2m_viz.data import read_image, to_uint8
from l2m_viz.errors import ImageError, L2MError, ShapeError
from l2m_viz.evaluation import compare_with_truth, end_point_error
from l2m_viz.geometry import normalized_grid, sample_warp
from l2m_viz.matching import Match, Matcher, Matches, load_matcher
from l2m_viz.show.colors import colorize
from l2m_viz.show.pair import PairView, match_numbers, view_pair
from l2m_viz.show.report import Number

MAX_PIXELS = 50_000_000  # of each picture: 48-megapixel phones pass, decoding stays below 1 GB
_MIN_SIDE = 16  # px; less shows nothing that could be matched or drawn
NUM_MATCHES = 5000  # rows of the CSV file
NUM_LINES = 150  # drawn: more would hide the pictures
ERROR_LIMIT_PX = 5.0  # end of the error map's colours

Tell = Callable[[float, str], object]


@dataclass(frozen=True)
class PairResult:
    """Everything that sliders and clicks need, so that they never match again."""

    view: PairView
    match: Match
    num_matches: int
    drawn: Matches
    seconds: float
    truth: Truth | None
    measured: dict[str, float]  # errors against the truth; empty without one
    folder: Path  # of this run alone, with match.npz and matches.csv


def match_files(
    path_A: str | None,
    path_B: str | None,
    matcher: str,
    examples: list[Example],
    folder: str | Path,
    tell: Tell,
) -> PairResult:
    """Read, match, and write match.npz and matches.csv into a new folder below ``folder``.

    Raises:
        L2MError: a picture is missing or unreadable, or the matcher cannot use it.
    """
    tell(0.05, "reading the pictures")
    image_A, image_B = _read(path_A, "A"), _read(path_B, "B")
    tell(0.2, f"matching with {matcher}")
    loaded = _loaded(matcher)
    start = time.perf_counter()
    match = loaded.match(image_A, image_B)
    seconds = time.perf_counter() - start
    tell(0.8, "sampling and drawing")
    own = Path(folder) / uuid.uuid4().hex  # a name that another visitor cannot guess
    match.save(own / "match.npz")
    truth = find_truth(examples, image_A, image_B)
    return PairResult(
        view=view_pair(image_A, image_B, match),
        match=match,
        num_matches=match.to_csv(own / "matches.csv", NUM_MATCHES, torch.Generator().manual_seed(0)),
        drawn=match.sample(NUM_LINES, torch.Generator().manual_seed(0)),
        seconds=seconds,
        truth=truth,
        measured=compare_with_truth(match, truth.warp, truth.covisible, truth.known) if truth else {},
        folder=own,
    )


@lru_cache(maxsize=1)
def _loaded(name: str) -> Matcher:
    """The matcher that was used last stays in memory: a large network takes seconds to load.

    Uploads may lie on their side: a camera's note of it is lost on many ways.
    """
    return load_matcher(name, turns=True)


def numbers(result: PairResult, min_certainty: float) -> list[Number]:
    """The match's own numbers, the time, and the errors where the truth is known."""
    own = match_numbers(result.match, result.num_matches, min_certainty)
    shown = [*own, Number("time", result.seconds, "s", "matching only")]
    measured = result.measured
    if not measured:
        return shown
    return [
        *shown,
        Number("end-point error", measured["epe_px"], "px", "median against the truth where covisible"),
        *(Number(f"PCK@{t}", 100 * measured[f"pck{t}"], "%", f"error below {t} px") for t in (1, 3, 5)),
    ]


def error_map(result: PairResult) -> Float[Tensor, "h w 3"] | None:
    """Map of the end-point error in pixels of B; grey where B does not show the point; None without a truth."""
    if result.truth is None:
        return None
    warp = sample_warp(result.match.warp_A_to_B, normalized_grid(result.match.hw_A))
    error = end_point_error(warp, result.truth.warp, result.match.hw_B)
    return colorize(error, "error", result.truth.covisible, (0.0, ERROR_LIMIT_PX))


def table(result: PairResult, min_certainty: float) -> str:
    """Numbers and sizes as a Markdown table."""
    rows = [(row.name, _text(row), row.note) for row in numbers(result, min_certainty)]
    match = result.match
    rows += [
        (f"size of {name}", f"{hw[1]} x {hw[0]} px", "")
        for name, hw in (("A", match.hw_A), ("B", match.hw_B))
    ]
    height, width = match.certainty_A_to_B.shape
    rows.append(("size of the warp", f"{width} x {height}", "the matcher's own resolution"))
    return "\n".join(["| measure | value | |", "|---|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)])


_PRUNING = threading.Lock()


def save_picture(result: PairResult, name: str, image: Float[Tensor, "h w 3"]) -> str:
    """Write a PNG with little compression: ten times as fast as gradio's own, so that sliders feel direct.

    The name is new each time, or the browser would show its old copy; a few older ones may still be on their way to it.
    """
    with _PRUNING:  # sliders call from several threads
        older = sorted(result.folder.glob(f"{name}-*.png"), key=lambda path: path.stat().st_mtime_ns)
        for path in older[:-4]:
            path.unlink(missing_ok=True)
    path = result.folder / f"{name}-{uuid.uuid4().hex}.png"
    PIL.Image.fromarray(to_uint8(image)).save(path, compress_level=1)
    return str(path)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Show what the core says about unusable input; for a bug, say that it is one and log where."""
    try:
        yield
    except L2MError as error:
        raise gr.Error(escape(str(error)), duration=20, print_exception=False) from error
    except MemoryError as error:
        raise gr.Error(
            "Not enough memory for pictures of this size. Resize them first.", duration=20
        ) from error
    except Exception as error:
        traceback.print_exc()
        text = f"Unexpected {type(error).__name__}. This is a bug of the app; the terminal shows where."
        raise gr.Error(text, duration=20, print_exception=False) from error


def _read(path: str | None, which: str) -> Float[Tensor, "h w 3"]:
    if path is None:
        raise L2MError(
            f"image {which} is missing", expected="two pictures", todo=f"upload one as image {which}"
        )
    name = f"image {which} ({Path(path).name})"
    try:
        image = read_image(path, max_pixels=MAX_PIXELS)
    except ImageError as error:  # the upload's place on the server tells the user nothing
        raise ImageError(str(error).replace(str(path), name)) from error
    if min(image.shape[:2]) < _MIN_SIDE:
        expected = f"at least {_MIN_SIDE}x{_MIN_SIDE} px"
        got = f"{image.shape[1]}x{image.shape[0]} px"
        raise ShapeError(name, expected=expected, got=got, todo="take a larger picture")
    return image


def _text(row: Number) -> str:
    """Value and unit; a measure that has nothing to measure has neither."""
    if math.isnan(row.value):
        return "none"
    value = f"{row.value:,}" if isinstance(row.value, int) else f"{row.value:.3g}"
    return f"{value} {row.unit}".rstrip()
