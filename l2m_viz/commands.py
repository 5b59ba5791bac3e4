"""The commands of `l2m`: thin wrappers of the public functions, by tyro."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from l2m_viz.demo import DemoCfg, run_demo
from l2m_viz.encoders.weights import resolve_device
from l2m_viz.errors import L2MError
from l2m_viz.evaluation import (
    DEV_BENCHMARKS,
    DevBenchmark,
    Report,
    evaluate,
    load_dev_pairs,
    report_format,
)
from l2m_viz.jobs import MatcherOptions, inspect_shards, lift_to_folder, match_to_folder
from l2m_viz.matching import list_matchers, load_matcher
from l2m_viz.matching.tiny import read_weights
from l2m_viz.photo import PhotoCfg
from l2m_viz.show.evaluation import Sheets
from l2m_viz.synth import SynthCfg, synthesise
from l2m_viz.training.presets import tiny_matcher
from l2m_viz.training.run import print_numbers
from l2m_viz.training.train_matcher import WEIGHTS, train_matcher

app = tyro.extras.SubcommandApp()
_Path = Annotated[Path, tyro.conf.Positional]


@app.command
def demo(cfg: Annotated[DemoCfg, tyro.conf.arg(name="")]) -> None:
    """Lift, splat and match the embedded stereo pair, or your own photo, and write an HTML report."""
    with tqdm(total=100, bar_format="{desc:36} {bar} {n:3.0f} % [{elapsed}]") as bar:

        def progress(share: float, what: str) -> None:
            bar.set_description_str(what)
            bar.update(100 * share - bar.n)

        result = run_demo(cfg, progress)
    for name, value in result.numbers.items():
        print(f"{name:24} {value:.4g}")
    print(f"report: {result.report.resolve()}")


@app.command
def match(
    image_a: _Path,
    image_b: _Path,
    cfg: Annotated[MatcherOptions, tyro.conf.arg(name="")],
    out: Path = Path("outputs/match"),
    num: int = 5000,
) -> None:
    """Match two images: warp and certainty as npz, sampled matches as CSV, pictures.

    Args:
        image_a: Image A.
        image_b: Image B.
        cfg: Which matcher.
        out: Folder for the files.
        num: Number of sampled matches.
    """
    for line in match_to_folder(image_a, image_b, cfg, out, num):
        print(line)


@app.command
def lift(
    image: _Path,
    depth: Path | None = None,
    depth_kind: Literal["depth", "disparity"] = "depth",
    depth_scale: float = 1.0,
    max_side: int = 800,
    out: Path = Path("outputs/lift"),
    views: int = 4,
    seed: int = 0,
) -> None:
    """Lift one photo to 3D: depth, mesh renders from random new cameras, Gaussians with features.

    Args:
        image: The photo.
        depth: Its depth (.npy, .npz, 16-bit .png, ...); without it the offline prior guesses.
        depth_kind: "disparity" if the depth file holds inverse depth up to scale and shift.
        depth_scale: Factor on the numbers of the depth file, 0.001 for millimetres.
        max_side: Larger photos are reduced to this long side in pixels.
        out: Folder for the files.
        views: Number of random new cameras, drawn from the paper's ranges.
        seed: Seed of the random cameras.
    """
    cfg = PhotoCfg(
        image=image, depth=depth, depth_kind=depth_kind, depth_scale=depth_scale, max_side=max_side
    )
    for line in lift_to_folder(cfg, out, views, seed):
        print(line)


@app.command
def synth(photos: _Path, out: _Path, cfg: Annotated[SynthCfg, tyro.conf.arg(name="")]) -> None:
    """Make training pairs from a folder of photos and write them as WebDataset shards; run it again to go on.

    Args:
        photos: Folder of photos; subfolders count.
        out: Folder for the shards and their index.
        cfg: Settings.
    """
    with tqdm(total=cfg.num, unit="pair") as bar:

        def progress(done: int, message: str) -> None:
            bar.update(done - bar.n)
            if message:
                bar.write(message)

        result = synthesise(photos, out, cfg, progress)
    skipped = f", {len(result.skipped)} photos skipped" if result.skipped else ""
    print(f"{result.num_made} pairs made, {result.num_kept} were there{skipped}: {out.resolve()}")


@app.command
def inspect(source: _Path, num: int = 8, out: Path = Path("outputs/pairs.png"), verify: bool = False) -> None:
    """Show pairs of a shard: corresponding points, B warped into A by the truth, what is covisible, the error.

    Args:
        source: A shard, or a folder of shards.
        num: Number of pairs, evenly spread.
        out: The picture (.png).
        verify: Compare all shards of the folder with their hashes first.
    """
    for line in inspect_shards(source, num, out, verify):
        print(line)


@app.command
def matchers() -> None:
    """List the matchers: which run here and now, and what the others need."""
    for info in list_matchers():
        print(f"{info.name:18} {info.kind:7} {'ready' if info.available else 'absent':7} {info.summary}")
        if not info.available:
            print(f"{'':34} {info.needs}")


training = tyro.extras.SubcommandApp()
app.command(
    training, name="train", help="Train the encoder (stage 1) or the matcher (stage 2) from single photos."
)


@training.command(name="matcher")
def train_tiny_matcher(
    photos: _Path,
    out: Path = Path("outputs/train-matcher"),
    val_photos: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    begin_from: Path | None = None,
    workers: int = 1,
    device: str = "auto",
) -> None:
    """Stage 2: train l2m-tiny on pairs made from a folder of photos; run it again in the same folder to go on.

    Args:
        photos: Folder of photos; subfolders count.
        out: The run's folder: checkpoint, log, TensorBoard events, and weights.safetensors for `--weights`.
        val_photos: Other photos, whose pairs judge the averaged weights as training goes.
        minutes: Stop after so many minutes; the run can go on later.
        steps: Optimiser steps in all, in place of the preset's.
        begin_from: Weights (.safetensors) to start from.
        workers: Processes that make pairs, for each size of picture; 0 makes them in between.
        device: "auto" is the GPU if torch sees one.
    """
    cfg = tiny_matcher()
    run = replace(cfg.run, minutes=minutes, steps=steps or cfg.run.steps)
    train_matcher(
        photos,
        out,
        replace(cfg, run=run, workers=workers),
        val_photos=val_photos,
        begin_from=read_weights(begin_from)[0] if begin_from else None,
        report=print_numbers,
        device=str(resolve_device(device)),
    )
    print(f"weights: {(out / WEIGHTS).resolve()}")


evaluation = tyro.extras.SubcommandApp()
app.command(evaluation, name="eval", help="Judge matchers by pairs whose truth is known.")


@evaluation.command
def dev(
    data: Path,
    matcher: tuple[str, ...] = ("dis", "sift"),
    benchmark: tuple[DevBenchmark, ...] = DEV_BENCHMARKS,
    weights: Path | None = None,
    out: Path | None = None,
    pictures: Path | None = None,
) -> None:
    """Judge matchers by the development pairs: errors, relative pose, certainty, overlap, time.

    Args:
        data: Folder with rgbd, graf, stereo_cones and sacre_coeur.
        matcher: Which matchers; `l2m matchers` lists them.
        benchmark: Which of the pairs.
        weights: The matcher's own file of weights, for a single matcher.
        out: Also write the table (.md), or every figure of every pair (.json).
        pictures: Folder for sheets of warped pictures, errors and certainties.
    """
    if out is not None:
        report_format(out)
    if not matcher or (weights is not None and len(matcher) > 1):
        expected = "at least one --matcher, and only one with --weights"
        raise L2MError("eval dev", expected=expected, got=str(len(matcher)))
    pairs = load_dev_pairs(data, benchmark)
    sheets, reports = Sheets(), []
    for name in matcher:
        loaded = load_matcher(name, weights=weights)
        with _percent_bar() as progress:
            on_match = sheets.add if pictures else None
            reports.append(evaluate(loaded, pairs, progress=progress, on_match=on_match))
    report = Report.joined(reports)
    print(report.to_markdown())
    if out is not None:
        report.save(out)
    if pictures is not None:
        for path in sheets.write(pictures):
            print(path)


@contextmanager
def _percent_bar() -> Iterator[Callable[[float, str], None]]:
    """A bar that takes the share of the work done, 0 to 1, and what is being done next."""
    with tqdm(total=100, bar_format="{desc:36} {bar} {n:3.0f} % [{elapsed}]") as bar:

        def progress(share: float, what: str) -> None:
            bar.set_description_str(what)
            bar.update(100 * share - bar.n)

        yield progress
