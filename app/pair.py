"""The pair tab: two pictures in; blend, warp, certainty, lines, numbers and files out."""

from abc import ABCMeta
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import gradio as gr
import torch
from gradio.component_meta import ComponentMeta
from gradio.data_classes import ImageData

from app.examples import Example
from app.work import (
    ERROR_LIMIT_PX,
    NUM_LINES,
    PairResult,
    error_map,
    friendly_errors,
    match_files,
    save_picture,
    table,
)
from l2m_viz.errors import L2MError
from l2m_viz.geometry import to_normalized, to_pixel
from l2m_viz.matching import NO_OVERLAP, list_matchers
from l2m_viz.show import figures
from l2m_viz.show.colors import colorize
from l2m_viz.show.pair import blend, hatch_uncertain, legend_html, mark_point, match_lines

DEFAULT_MATCHER = "l2m-tiny"  # the first that is there, if this copy of the package lacks its weights
_WAITING = "Give two pictures, or click an example, then press **Match**."
_CLICK = "Click anywhere on A: its match appears in B."


@dataclass(frozen=True)
class _Outputs:
    """Components that a result fills."""

    status: gr.Markdown
    results: gr.Column
    blended: gr.Image
    slider: gr.ImageSlider
    warped: gr.Image
    certainty: gr.Image
    error: gr.Image
    error_legend: gr.HTML
    lines: gr.Image
    click_A: gr.Image
    click_B: gr.Image
    click_text: gr.Markdown
    table: gr.Markdown
    npz: gr.DownloadButton
    csv: gr.DownloadButton


def pair_tab(examples: list[Example]) -> None:
    """Lay the tab out and wire it."""
    result = gr.State(time_to_live=3600)
    with gr.Row():
        image_A, image_B = _upload("Image A"), _upload("Image B")
        with gr.Column(scale=2, min_width=260):
            here = [info for info in list_matchers() if info.available]
            choices = [(f"{info.name}: {info.summary}", info.name) for info in here]
            first = next((info.name for info in here if info.name == DEFAULT_MATCHER), here[0].name)
            matcher = gr.Dropdown(choices, value=first, label="Matcher", elem_id="matcher")
            run = gr.Button("Match", variant="primary", elem_id="match")
            status = gr.Markdown(_WAITING, elem_id="status", min_height=60)
    labels = [example.label for example in examples]
    rows = [[str(example.path_A), str(example.path_B)] for example in examples]
    gr.Examples(rows, [image_A, image_B], label="Examples", example_labels=labels)
    with gr.Column(visible=False) as results, gr.Row():
        with gr.Column(scale=3, min_width=420):
            share, pictures = _pictures()
        with gr.Column(scale=2, min_width=320):
            threshold, numbers_and_files = _numbers_and_files()
    with gr.Accordion("Matchers that need files first", open=False, elem_id="absent"):
        gr.Markdown(_absent())
    out = _Outputs(status=status, results=results, **pictures, **numbers_and_files)
    folder = image_A.GRADIO_CACHE

    def on_match(
        path_A: str | None, path_B: str | None, name: str, share: float, threshold: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio finds it by its default value)
    ) -> dict[Any, Any]:  # fmt: skip
        with friendly_errors():
            found = match_files(path_A, path_B, name, examples, folder, progress)
            return {result: found, **_fill(out, found, share, threshold)}

    run.click(
        on_match, [image_A, image_B, matcher, share, threshold], [result, *vars(out).values()],
        api_name="match", concurrency_limit=1, concurrency_id="match", trigger_mode="once", show_progress_on=status,
    )  # fmt: skip
    cheap: dict[str, Any] = {
        "trigger_mode": "always_last",
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    share.change(_on_blend, [result, share, threshold], out.blended, **cheap)
    threshold.change(
        partial(_on_threshold, out),
        [result, share, threshold],
        [out.blended, out.slider, out.warped, out.table],
        **cheap,
    )
    for image in (image_A, image_B):  # no old result beside a new picture
        image.change(
            lambda: (gr.Column(visible=False), _WAITING), None, [results, status], queue=False, **cheap
        )
    out.click_A.select(_on_click, result, [out.click_A, out.click_B, out.click_text], **cheap)


def _absent() -> str:
    """The matchers that cannot run here and now, and their files by name: where they go is not a visitor's business."""
    rows = [
        f"| {info.name} | {info.summary} | {', '.join(f'`{file}`' for file in info.absent_files)} |"
        for info in list_matchers()
        if not info.available
    ]
    table = "\n".join(["| matcher | what it is | files |", "|---|---|---|", *rows])
    return (
        f"{table}\n\nOn the machine of the app, `l2m matchers` says where to get them and where to put them."
    )


def _uploaded_path(_: gr.Image, payload: ImageData | None) -> str | None:
    return payload.path if payload else None


# Gradio's own preprocessing opens an upload with any of Pillow's decoders before we are asked; `read_image` is the only
# door for strange files. It has to be a class, as gradio makes new components of it during a session, and it is made
# past gradio's metaclass, which would write a .pyi file beside this one.
_Upload = cast(
    type[gr.Image],
    ABCMeta.__new__(ComponentMeta, "Image", (gr.Image,), {"preprocess": _uploaded_path, "EVENTS": []}),
)


def _upload(label: str) -> gr.Image:
    return _Upload(
        label=label, type="filepath", sources=["upload", "clipboard"], height=240, min_width=240, scale=2,
        elem_id=label.replace(" ", "_").lower(), buttons=["fullscreen"], format="png", alt_text=label,
    )  # fmt: skip


def _pictures() -> tuple[gr.Slider, dict[str, Any]]:
    picture = partial(
        gr.Image, format="png", interactive=False, buttons=["download", "fullscreen"], min_width=200
    )
    with gr.Tab("Blend"):
        blended = picture(label="A to B warped into A; hatched where the match is uncertain", elem_id="blend")
        share = gr.Slider(0, 100, value=50, step=1, label="Share of B (%)", elem_id="share")
    with gr.Tab("A | B"):
        slider = gr.ImageSlider(
            label="A left, B warped into A right",
            format="png",
            interactive=False,
            max_height=900,
            elem_id="slider",
        )
    with gr.Tab("Maps"):
        with gr.Row():
            warped = picture(label="B warped into A", elem_id="warped")
            with gr.Column(min_width=200):
                certainty = picture(label="Certainty", elem_id="certainty")
                gr.HTML(legend_html("certainty", "0", "1", "certainty"))
        error = picture(label="Error against the truth (grey: not covisible)", elem_id="error", visible=False)
        legend = legend_html("error", "0", f"{ERROR_LIMIT_PX:g}+", "px")
        error_legend = gr.HTML(legend, visible=False)
    with gr.Tab("Matches"):
        lines = picture(label=f"At most {NUM_LINES} matches, A left, B right", elem_id="lines")
        gr.HTML(legend_html("certainty", "0", "1", "certainty"))
    with gr.Tab("Click a pixel"):
        click_text = gr.Markdown(_CLICK, elem_id="click_text")
        with gr.Row():
            click_A = picture(label="A: click here", elem_id="click_a", buttons=[])
            click_B = picture(label="B: the match", elem_id="click_b", buttons=[])
    return share, {
        "blended": blended, "slider": slider, "warped": warped, "certainty": certainty, "error": error,
        "error_legend": error_legend, "lines": lines, "click_A": click_A, "click_B": click_B, "click_text": click_text,
    }  # fmt: skip


def _numbers_and_files() -> tuple[gr.Slider, dict[str, Any]]:
    threshold = gr.Slider(
        0,
        1,
        value=0.5,
        step=0.01,
        label="Certainty threshold",
        info="Below it: hatched.",
        elem_id="threshold",
    )
    shown = gr.Markdown(elem_id="numbers")
    with gr.Row():
        npz = gr.DownloadButton("match.npz (dense)", elem_id="npz", size="sm", min_width=140)
        csv = gr.DownloadButton("matches.csv", elem_id="csv", size="sm", min_width=140)
    return threshold, {"table": shown, "npz": npz, "csv": csv}


def _fill(out: _Outputs, found: PairResult, share: float, threshold: float) -> dict[Any, Any]:
    """Values of all outputs for a new result."""
    view, save = found.view, partial(save_picture, found)
    error = error_map(found)
    lines = found.folder / "lines.png"
    lines.write_bytes(figures.to_png(match_lines(view, found.match, found.drawn)))
    return {
        **_on_threshold(out, found, share, threshold),
        out.status: _verdict(found),
        out.results: gr.Column(visible=True),
        out.certainty: save("certainty", colorize(view.certainty, "certainty")),
        out.error: gr.Image(None if error is None else save("error", error), visible=error is not None),
        out.error_legend: gr.HTML(visible=error is not None),
        out.lines: str(lines),
        out.click_A: save("click_a", view.image_A),
        out.click_B: save("click_b", view.image_B),
        out.click_text: _CLICK,
        out.npz: gr.DownloadButton(value=str(found.folder / "match.npz")),
        out.csv: gr.DownloadButton(value=str(found.folder / "matches.csv")),
    }


def _verdict(found: PairResult) -> str:
    overlap = found.match.overlap
    if overlap >= NO_OVERLAP:
        turns = found.match.turns_B
        turned = f" B was turned by {90 * turns}° counter-clockwise to find them." if turns else ""
        return f"Overlap **{overlap:.2f}**, {found.num_matches:,} matches, {found.seconds:.1f} s.{turned}"
    plain = f"These two images do not seem to show the same thing (overlap {overlap:.2f})."
    gr.Warning(plain, title="Little overlap")
    return f"⚠️ **{plain}** Or they differ by more than this matcher can follow: try another."


def _on_threshold(out: _Outputs, found: PairResult | None, share: float, threshold: float) -> dict[Any, Any]:
    """Everything that depends on which pixels count as certain."""
    with friendly_errors():
        found = _still_here(found)
        warped = save_picture(
            found, "warped", hatch_uncertain(found.view.warped_B, found.view.certainty >= threshold)
        )
        return {
            out.blended: _on_blend(found, share, threshold),
            out.slider: (save_picture(found, "image_a", found.view.image_A), warped),
            out.warped: warped,
            out.table: table(found, threshold),
        }


def _on_blend(found: PairResult | None, share: float, threshold: float) -> str:
    with friendly_errors():
        found = _still_here(found)
        return save_picture(found, "blend", blend(found.view, share / 100, threshold))


def _on_click(found: PairResult | None, event: gr.SelectData) -> tuple[str, str, str]:
    """Mark the clicked point of A and its match in B."""
    with friendly_errors():
        found = _still_here(found)
        view, match = found.view, found.match
        # The browser rounds the continuous position to whole pixels of the picture it shows: no half is missing.
        shown = torch.tensor([float(value) for value in event.index])
        point_A = to_pixel(to_normalized(shown, (view.image_A.shape[0], view.image_A.shape[1])), match.hw_A)
        point_B, certainty = match.query(point_A)
        (x_A, y_A), (x_B, y_B) = point_A.tolist(), point_B.tolist()
        return (
            save_picture(found, "click_a", mark_point(view.image_A, point_A, match.hw_A)),
            save_picture(found, "click_b", mark_point(view.image_B, point_B, match.hw_B)),
            f"A **({x_A:.1f}, {y_A:.1f})** px → B **({x_B:.1f}, {y_B:.1f})** px, certainty **{certainty:.2f}**",
        )


def _still_here(found: PairResult | None) -> PairResult:
    if found is None:
        raise L2MError("there is no result to show", todo="press Match; results are forgotten after an hour")
    return found
