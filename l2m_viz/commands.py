"""The commands of `l2m`: thin wrappers of the public functions, by tyro."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from l2m_viz.data.files import atomic_write, write_text
from l2m_viz.demo import DemoCfg, run_demo
from l2m_viz.encoders import load_encoder
from l2m_viz.encoders.conv_pyramid import load_encoder_state
from l2m_viz.encoders.weights import DINOV2_VITS14, resolve_device
from l2m_viz.errors import L2MError
from l2m_viz.evaluation import (
    DEV_BENCHMARKS,
    DevBenchmark,
    Report,
    evaluate,
    load_dev_pairs,
    report_format,
)
from l2m_viz.evaluation.features import (
    FeaturePckCfg,
    evaluate_features,
    features_table,
    photo_pairs,
    renamed,
)
from l2m_viz.jobs import MatcherOptions, inspect_shards, lift_to_folder, match_to_folder, require_png
from l2m_viz.matching import list_matchers, load_matcher
from l2m_viz.matching.tiny import read_weights
from l2m_viz.matching.weights import published_encoder, save_official
from l2m_viz.photo import ENCODER, PhotoCfg
from l2m_viz.progress import percent_bar
from l2m_viz.show.evaluation import Sheets
from l2m_viz.show.features import compare_encoders
from l2m_viz.show.figures import to_png
from l2m_viz.synth import SynthCfg, synthesise
from l2m_viz.training.presets import PRESETS, dinov2_stage_1, tiny_stage_1
from l2m_viz.training.run import is_main_process, print_numbers
from l2m_viz.training.stage_1 import StageOneOptions, train_stage_1
from l2m_viz.training.train_matcher import WEIGHTS, MatcherTrainingOptions, train_matcher
from l2m_viz.validation import Validation

app = tyro.extras.SubcommandApp()
_Path = Annotated[Path, tyro.conf.Positional]


@app.command
def demo(cfg: Annotated[DemoCfg, tyro.conf.arg(name="")]) -> None:
    """Lift, splat and match the embedded stereo pair, or your own photo, and write an HTML report."""
    with percent_bar() as progress:
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
    hloc: Path | None = None,
    colmap: Path | None = None,
) -> None:
    """Match two images: warp and certainty as npz, sampled matches as CSV, pictures.

    Args:
        image_a: Image A.
        image_b: Image B.
        cfg: Which matcher.
        out: Folder for the files.
        num: Number of sampled matches.
        hloc: Folder whose features.h5 and matches.h5 get this pair, too, under the files' names.
        colmap: Database of COLMAP that gets this pair, too, under the files' names.
    """
    for line in match_to_folder(image_a, image_b, cfg, out, num, hloc=hloc, colmap=colmap):
        print(line)


@app.command
def lift(
    image: _Path,
    depth: Path | None = None,
    depth_kind: Literal["depth", "disparity"] = "depth",
    depth_scale: float = 1.0,
    max_side: int = 800,
    encoder: str = ENCODER,
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
        encoder: Whose features the Gaussians carry: "l2m-tiny" (3D-aware), "l2m-tiny-2d", "dense-sift" and others.
        out: Folder for the files.
        views: Number of random new cameras, drawn from the paper's ranges.
        seed: Seed of the random cameras.
    """
    cfg = PhotoCfg(
        image=image,
        depth=depth,
        depth_kind=depth_kind,
        depth_scale=depth_scale,
        max_side=max_side,
        encoder=encoder,
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
    with tqdm(total=cfg.num, unit="pair", disable=None) as bar:

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
    options: Annotated[MatcherTrainingOptions, tyro.conf.arg(name="")],
    out: Path = Path("outputs/train-matcher"),
    val_photos: Path | None = None,
    dev_data: Path | None = None,
    begin_from: Path | None = None,
    encoder: Path | None = None,
    device: str = "auto",
) -> None:
    """Stage 2: train a matcher on pairs made from a folder of photos; run it again in the same folder to go on.

    Args:
        photos: Folder of photos; subfolders count.
        options: How long, and what learns.
        out: The run's folder: checkpoint, log, TensorBoard events, pictures of matched pairs in validation/, and
            weights.safetensors for `--weights`.
        val_photos: Other photos, whose pairs judge the averaged weights as training goes.
        dev_data: Folder of development pairs, see `l2m eval dev`, that are matched at each evaluation, too.
        begin_from: Weights (.safetensors) of a matcher to start from.
        encoder: Weights of stage 1 to start the encoder from; of the preset "official", its DINOv2.
        device: "auto" is the GPU if torch sees one.
    """
    begin = read_weights(begin_from)[0] if begin_from else None
    if begin_from and is_main_process() and not (out / "checkpoint.pt").is_file():
        print(f"begins from {begin_from}: its averaged weights, a new optimiser, and a warm-up")
    official = options.preset == "official"
    own = load_encoder_state(encoder) if encoder and not official else None
    pairs = photo_pairs(val_photos, FeaturePckCfg(num_photo_pairs=6)) if val_photos else []
    pairs += load_dev_pairs(dev_data) if dev_data else []
    trained = train_matcher(
        photos,
        out,
        options.applied_to(PRESETS[options.preset]()),
        val_photos=val_photos,
        begin_from=begin,
        encoder=published_encoder(encoder) if official else own,
        validate=Validation(pairs, out / "validation") if pairs and not official else None,
        report=print_numbers,
        device=str(resolve_device(device)),
    )
    if not is_main_process():
        return
    print(f"weights: {(out / WEIGHTS).resolve()}")
    if official:
        save_official(out / "official.safetensors", trained.state_dict())
        print(f"in RoMa's format: {(out / 'official.safetensors').resolve()}")


@training.command(name="encoder")
def train_stage_1_encoder(
    photos: _Path,
    options: Annotated[StageOneOptions, tyro.conf.arg(name="")],
    out: Path = Path("outputs/train-encoder"),
    val_photos: Path | None = None,
    begin_from: Path | None = None,
    device: str = "auto",
) -> None:
    """Stage 1: train the 2D encoder, then make it 3D-aware; run it again with the same folder to go on.

    Args:
        photos: Folder of photos; subfolders count.
        options: What is trained, and how long.
        out: Folder for both runs (2d, 3d) and the files of weights, for `load_encoder` and stage 2.
        val_photos: Other photos, whose pairs judge the averaged weights as training goes.
        begin_from: Weights of a 2D encoder to make 3D-aware; then none is trained. DINOv2's published ones are
            downloaded if none are named.
        device: "auto" is the GPU if torch sees one.
    """
    if options.encoder == "l2m-tiny":
        cfg, begin = tiny_stage_1(), load_encoder_state(begin_from) if begin_from else None
    else:
        cfg, begin = dinov2_stage_1(), DINOV2_VITS14.read(begin_from)
    written = train_stage_1(
        photos,
        out,
        options.applied_to(cfg),
        begin_from=begin,
        val_photos=val_photos,
        report=print_numbers,
        device=str(resolve_device(device)),
    )
    if is_main_process():
        for path in written:
            print(f"weights: {path.resolve()}")


evaluation = tyro.extras.SubcommandApp()
app.command(evaluation, name="eval", help="Judge matchers by pairs whose truth is known.")


@evaluation.command
def dev(
    data: Path,
    matcher: tuple[str, ...] = ("l2m-tiny", "dis", "sift"),
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
        with percent_bar() as progress:
            on_match = sheets.add if pictures else None
            reports.append(evaluate(loaded, pairs, progress=progress, on_match=on_match))
    report = Report.joined(reports)
    print(report.to_markdown())
    if out is not None:
        report.save(out)
    if pictures is not None:
        for path in sheets.write(pictures):
            print(path)


@evaluation.command(name="features")
def eval_features(
    data: Path | None = None,
    photos: Path | None = None,
    encoder: tuple[str, ...] = ("l2m-tiny", "l2m-tiny-2d", "dense-sift"),
    num: int = 64,
    out: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Judge encoders by whether features of the same point agree across views.

    Args:
        data: Folder with rgbd, for frames with measured depth.
        photos: Folder of photos that nothing was trained on, to make pairs from.
        encoder: Which encoders; NAME=FILE takes the weights of a file.
        num: Pairs made from photos.
        out: Also write the table (.md).
        picture: Also draw the first pair as the encoders see it (.png).
    """
    if picture is not None:
        require_png(picture)
    cfg = FeaturePckCfg(num_photo_pairs=num)
    pairs = photo_pairs(photos, cfg) if photos else []
    pairs += load_dev_pairs(data, ["rgbd"]) if data else []
    if not pairs:
        raise L2MError("eval features", expected="--data, --photos, or both", got="neither")
    encoders = {spec: load_encoder(*spec.split("=", 1)) for spec in encoder}
    results = []
    for spec, loaded in encoders.items():
        with percent_bar() as progress:
            results += renamed(evaluate_features(loaded, pairs, cfg, progress), spec)
    table = features_table(results, cfg)
    print(table)
    if out is not None:
        write_text(out, table)
    if picture is not None:
        with atomic_write(picture) as file:
            file.write(to_png(compare_encoders(list(encoders.items()), pairs[0])))
        print(picture)
