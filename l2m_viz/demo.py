"""The main job, end to end: lift a photo, splat its Gaussians, match two views, check everything, write a report.

On the embedded stereo pair everything is judged by measurement: the second photo is real and the disparity was
measured. For a single photo the second view is rendered from the lifted scene; the correspondence is then exact for
that scene, though the depth itself may be a guess, and the report says so.
"""

import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from l2m_viz.data import atomic_write, remove_file, to_uint8, write_image, write_text
from l2m_viz.encoders import FeaturePCA, load_encoder
from l2m_viz.errors import L2MError
from l2m_viz.evaluation import compare_with_truth, end_point_error, psnr, ssim
from l2m_viz.gaussians import HOLE_ALPHA, Gaussians, rasterize
from l2m_viz.geometry import HW, normalized_grid, relative_pose, sample_image, sample_warp
from l2m_viz.lifting import NEAR, LiftedScene, View, orbit_cameras, warp_from_depth
from l2m_viz.matching import Match, load_matcher
from l2m_viz.photo import NUM_FEATURES, LiftedPhoto, PhotoCfg, feature_gaussians, lift_photo
from l2m_viz.progress import Progress
from l2m_viz.show import figures
from l2m_viz.show.figures import Panel
from l2m_viz.show.report import Number, Picture, Section, write_report

# The network that ships with the package, and two classical methods to compare it with.
_MATCHERS = ("l2m-tiny", "dis", "sift")


@dataclass(frozen=True)
class DemoCfg(PhotoCfg):
    """Settings of the demo."""

    # Folder for the report and its files.
    out: Path = Path("outputs/demo")
    # Frames of the orbit animation.
    orbit_frames: int = 24
    # Half axis of the orbit, in units of the scene (its nearest depth).
    orbit_radius: float = 0.12


@dataclass(frozen=True)
class DemoResult:
    """Where the report is, and what was measured."""

    report: Path
    numbers: dict[str, float]


@dataclass(frozen=True)
class _Stage:
    section: Section
    numbers: dict[str, float]


def run_demo(cfg: DemoCfg | None = None, progress: Progress | None = None) -> DemoResult:
    """Run the whole chain; write ``report.html``, pictures, npz files and ``numbers.json`` into ``cfg.out``.

    Raises:
        ImageError: the photo cannot be read.
        FileFormatError: the depth cannot be read.
        MissingError: there is no such sample.
    """
    cfg = cfg or DemoCfg()
    tell = progress or (lambda share, what: None)
    start = time.perf_counter()
    if cfg.orbit_frames < 1:
        raise L2MError("demo", expected="at least one orbit frame", got=str(cfg.orbit_frames))
    for name in ("report.html", "numbers.json"):  # a run that fails must not leave an older one's result
        remove_file(cfg.out / name)
    tell(0.0, "lifting: depth, mesh, z-buffer")
    photo = lift_photo(cfg)
    view_B = photo.scene.render(photo.camera_B)
    lifting = _lift_stage(photo, view_B, cfg)
    tell(0.25, "splatting: one Gaussian a pixel")
    splatting = _splat_stage(photo, view_B, cfg)
    tell(0.7, f"matching: {', '.join(_MATCHERS)}")
    matching = _match_stage(photo, view_B, cfg)
    tell(0.95, "writing the report")
    seconds = time.perf_counter() - start
    numbers = {**lifting.numbers, **splatting.numbers, **matching.numbers, "run_time_s": seconds}
    settings = {
        "input": photo.title,
        "working size": f"{photo.scene.hw[1]}x{photo.scene.hw[0]} px",
        "depth": f"{photo.depth.method} ({photo.depth.kind})",
        "run time": f"{seconds:.1f} s",
        "threads": str(torch.get_num_threads()),
    }
    finite = {
        name: value if math.isfinite(value) else None for name, value in numbers.items()
    }  # JSON has no NaN
    write_text(cfg.out / "numbers.json", json.dumps(finite, indent=2))
    report = cfg.out / "report.html"
    sections = [lifting.section, splatting.section, matching.section]
    write_report(report, f"Lift to Match: {photo.title}", sections, settings)
    tell(1.0, "done")
    return DemoResult(report, numbers)


def _lift_stage(photo: LiftedPhoto, view: View, cfg: DemoCfg) -> _Stage:
    """Show the mesh from camera B and compare it with the real photo B where there is one."""
    scene, filled = photo.scene, ~view.hole_mask
    numbers = {"lift_filled": filled.float().mean().item()}
    shown = [Number("covered part of the new view", numbers["lift_filled"])]
    label = f"depth ({photo.length_unit})"
    pictures = [
        Panel("photo A", scene.image),
        Panel(f"depth, {photo.depth.method}", scene.depth, "depth", scene.valid_mask, label),
        Panel("A rendered into camera B", view.image, mask=filled),
    ]
    if photo.image_B is not None:
        numbers["lift_psnr_db"] = psnr(view.image, photo.image_B, filled)
        numbers["lift_ssim"] = ssim(view.image, photo.image_B, filled)
        shown += [
            Number("PSNR against the real photo B", numbers["lift_psnr_db"], "dB", "over the covered pixels"),
            Number("SSIM against the real photo B", numbers["lift_ssim"], "", "over wholly covered windows"),
        ]
        error = (view.image - photo.image_B).abs().mean(dim=-1)
        pictures += [
            Panel("real photo B", photo.image_B),
            Panel("difference", error, "error", filled, "mean |RGB|"),
        ]
    text = (
        "One mesh vertex a pixel, no triangle across a depth discontinuity, rendered with a z-buffer. Grey pixels are"
        " holes: the photo says nothing about them."
    )
    if photo.depth.method == "prior":
        text += (
            " The depth is a guess from position, segments and sky, made offline without any learned weights: the"
            " geometry is plausible at best. Give a depth file for a true one."
        )
    write_image(cfg.out / "mesh_view.png", view.image)
    scene.save(cfg.out / "scene.npz")
    caption = "The photo, its depth, and the lifted scene from camera B."
    return _Stage(Section("1. Lift", text, shown, [_picture(cfg, "lift", pictures, caption)]), numbers)


def _splat_stage(photo: LiftedPhoto, view: View, cfg: DemoCfg) -> _Stage:
    """Turn the photo into Gaussians with features; splat them into camera B and along an orbit."""
    scene = photo.scene
    gaussians, pca = feature_gaussians(scene.image, photo.depth, scene.K, cfg.encoder)
    render = rasterize(gaussians, photo.camera_B, near=NEAR * scene.unit)
    drawn = render.alpha > HOLE_ALPHA
    numbers = {"num_gaussians": float(len(gaussians))}
    shown = [Number("Gaussians", len(gaussians)), Number("feature channels", NUM_FEATURES)]
    if photo.image_B is not None:
        numbers["splat_psnr_db"] = psnr(render.color, photo.image_B, ~view.hole_mask)
        note = "over the pixels that the mesh covers"
        shown.append(Number("PSNR against the real photo B", numbers["splat_psnr_db"], "dB", note))
    pictures = [
        Panel("splatted colour", render.color, mask=drawn),
        Panel("splatted depth", render.depth, "depth", drawn, f"depth ({photo.length_unit})"),
        Panel("alpha", render.alpha, "certainty", label="accumulated opacity"),
        Panel("features of photo A (PCA)", _photo_feature_colors(scene.image, cfg.encoder, pca)),
        Panel("splatted features (same PCA)", pca.colors(render.mean_features), mask=drawn),
    ]
    caption = (
        f"The Gaussians from camera B, with features of {cfg.encoder}. Equal colour means equal feature in the photo"
        " and in 3D: one PCA basis."
    )
    still = _picture(cfg, "splat", pictures, caption)
    moving = Picture(
        _orbit(gaussians, pca, scene, cfg),
        "A short orbit: colour and feature colours, splatted on the CPU.",
        "image/webp",
    )
    gaussians.save(cfg.out / "gaussians.npz")
    pca.save(cfg.out / "pca.npz")
    text = "One flat Gaussian a pixel, as wide as the pixel's footprint on the surface, carrying colour and features."
    return _Stage(Section("2. Splat", text, shown, [still, moving]), numbers)


def _photo_feature_colors(
    image: Float[Tensor, "h w 3"], encoder: str, pca: FeaturePCA
) -> Float[Tensor, "h w 3"]:
    small = pca.colors(pca.project(load_encoder(encoder)(image)))
    return sample_image(small, normalized_grid((image.shape[0], image.shape[1])))


def _orbit(gaussians: Gaussians, pca: FeaturePCA, scene: LiftedScene, cfg: DemoCfg) -> bytes:
    """Animated WebP of colour beside feature colours, at half size."""
    half: HW = (max(1, scene.hw[0] // 2), max(1, scene.hw[1] // 2))
    frames = []
    for camera in orbit_cameras(scene, cfg.orbit_frames, cfg.orbit_radius):
        render = rasterize(gaussians, camera.resized(half), near=NEAR * scene.unit)
        visible = (render.alpha > HOLE_ALPHA)[..., None]
        both = torch.cat([render.color, pca.colors(render.mean_features) * visible], dim=1)
        frames.append(Image.fromarray(to_uint8(both)))
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "WEBP", save_all=True, append_images=frames[1:], duration=80, loop=0, quality=70, method=2
    )
    with atomic_write(cfg.out / "orbit.webp") as file:
        file.write(buffer.getvalue())
    return buffer.getvalue()


def _match_stage(photo: LiftedPhoto, view: View, cfg: DemoCfg) -> _Stage:
    """Match A and B with the network and the classical matchers; compare with the exact correspondence."""
    scene = photo.scene
    image_B = view.image if photo.image_B is None else photo.image_B
    warp, covisible = photo.warp_A_to_B, photo.covisibility_A_to_B
    if warp is None or covisible is None:
        pose = relative_pose(scene.camera.w2c, view.camera.w2c)
        warp, covisible = warp_from_depth(
            scene.depth, scene.K, view.depth, view.camera.K, pose, scene.valid_mask, ~view.hole_mask
        )
    numbers, shown, pictures = {}, [], []
    for name in _MATCHERS:
        match = load_matcher(name).match(scene.image, image_B)
        match.save(cfg.out / f"match_{name}.npz")
        measured = compare_with_truth(match, warp, covisible, scene.valid_mask)
        numbers |= {f"{name}_{key}": value for key, value in {**measured, "overlap": match.overlap}.items()}
        shown += _match_numbers(name, measured, match.overlap)
        maps = _match_maps(name, image_B, match, warp, covisible)
        caption = (
            f"{name}: B warped into A, its certainty, and the error against the truth (grey: not covisible)."
        )
        pictures.append(_picture(cfg, f"match_{name}", maps, caption))
        sampled = match.sample(300, torch.Generator().manual_seed(0))
        lines = figures.matches(scene.image, image_B, sampled, title=name)
        pictures.append(
            _figure(cfg, f"lines_{name}", lines, f"{name}: sampled matches, coloured by certainty.")
        )
    real = "the real photo B" if photo.image_B is not None else "the rendered view B (its holes are black)"
    truth = "the lifted depth" if photo.warp_A_to_B is None else "measured disparity"
    text = (
        f"Photo A against {real}; the truth comes from {truth}. {_MATCHERS[0]} is the network that ships with the"
        f" package, trained on single photos alone; {' and '.join(_MATCHERS[1:])}, which learn nothing, are there to"
        " compare."
    )
    return _Stage(Section("3. Match", text, shown, pictures), numbers)


def _match_numbers(name: str, measured: dict[str, float], overlap: float) -> list[Number]:
    return [
        Number(f"{name}: median end-point error", measured["epe_px"], "px", "over covisible pixels"),
        *(Number(f"{name}: PCK@{t}", measured[f"pck{t}"], "", f"share under {t} px") for t in (1, 3, 5)),
        Number(f"{name}: average precision", measured["ap"], "", "certainty as a sign of covisibility"),
        Number(f"{name}: overlap", overlap, "", "mean certainty"),
    ]


def _match_maps(name: str, image_B: Tensor, match: Match, warp: Tensor, covisible: Tensor) -> list[Panel]:
    grid = normalized_grid((warp.shape[0], warp.shape[1]))
    estimated, certainty = sample_warp(match.warp_A_to_B, grid), sample_image(match.certainty_A_to_B, grid)
    error = end_point_error(estimated, warp, match.hw_B)
    return [
        Panel(f"{name}: B warped into A", sample_image(image_B, estimated), mask=certainty > 0.05),
        Panel("certainty", certainty, "certainty", label="certainty"),
        Panel("end-point error", error, "error", covisible, "px", limits=(0.0, 5.0)),
    ]


def _picture(cfg: DemoCfg, name: str, contents: list[Panel], caption: str) -> Picture:
    return _figure(cfg, name, figures.panels(*contents), caption)


def _figure(cfg: DemoCfg, name: str, figure: Figure, caption: str) -> Picture:
    data = figures.to_png(figure)
    with atomic_write(cfg.out / f"{name}.png") as file:
        file.write(data)
    return Picture(data, caption)
