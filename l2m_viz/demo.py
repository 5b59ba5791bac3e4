"""The main job, end to end: lift a photo, splat its Gaussians, match two views, check everything, write a report.

On the embedded stereo pair everything is judged by measurement: the second photo is real and the disparity was
measured. For a single photo the second view is rendered from the lifted scene; the correspondence is then exact for
that scene, though the depth itself may be a guess, and the report says so.
"""

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from l2m_viz.data import (
    Sample,
    atomic_write,
    fit_long_side,
    load_sample,
    read_image,
    to_uint8,
    write_image,
    write_text,
)
from l2m_viz.encoders import FeaturePCA, load_encoder
from l2m_viz.evaluation import average_precision, end_point_error, pck, psnr, ssim
from l2m_viz.gaussians import Gaussians, gaussians_from_depth, rasterize
from l2m_viz.geometry import HW, Camera, intrinsics, normalized_grid, relative_pose, sample_image, to_pixel
from l2m_viz.lifting import (
    Depth,
    LiftedScene,
    View,
    estimate_depth,
    lift,
    orbit_cameras,
    read_depth,
    warp_from_depth,
)
from l2m_viz.matching import Match, load_matcher
from l2m_viz.show import figures
from l2m_viz.show.figures import Panel
from l2m_viz.show.report import Number, Picture, Section, write_report

Progress = Callable[[float, str], None]
"""Called with the share of the work done, 0 to 1, and what is being done next."""

NUM_FEATURES = 16  # PCA components of the descriptor that each Gaussian carries
HOLE_ALPHA = 0.5  # a splatted pixel with less accumulated opacity than this counts as a hole
# Focal length over width of a photo without calibration: 61 degrees, a phone's main camera. The paper's sampler draws
# wider lenses for training pairs; for looking at a photo a usual lens is the better guess.
FOCAL_OVER_WIDTH = 0.85


@dataclass(frozen=True)
class DemoCfg:
    """Settings of the demo."""

    # Folder for the report and its files.
    out: Path = Path("outputs/demo")
    # Embedded sample to use when no photo is given.
    sample: str = "motorcycle"
    # A photo of your own.
    image: Path | None = None
    # Its depth (.npy, .npz, 16-bit .png, ...); without it the offline prior guesses.
    depth: Path | None = None
    # "disparity" if the depth file holds inverse depth up to scale and shift.
    depth_kind: Literal["depth", "disparity"] = "depth"
    # Factor on the numbers of the depth file, 0.001 for millimetres.
    depth_scale: float = 1.0
    # Larger photos are reduced to this long side in pixels.
    max_side: int = 800
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
class _Job:
    """A photo with depth, and the camera of the second view; the second photo and the truth where they are real."""

    title: str
    image_A: Float[Tensor, "h w 3"]
    depth: Depth
    K: Float[Tensor, "3 3"]
    camera_B: Camera | None = None
    image_B: Float[Tensor, "h w 3"] | None = None
    warp: Float[Tensor, "h w 2"] | None = None
    covisibility: Bool[Tensor, "h w"] | None = None


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
    tell(0.0, "reading the photo and its depth")
    job = _job(cfg)
    tell(0.1, "lifting: mesh and z-buffer")
    scene, view_B, lifting = _lift_stage(job, cfg)
    tell(0.3, "splatting: one Gaussian a pixel")
    splatting = _splat_stage(job, scene, view_B.camera, cfg)
    tell(0.7, "matching: dis and sift")
    matching = _match_stage(job, scene, view_B, cfg)
    tell(0.95, "writing the report")
    seconds = time.perf_counter() - start
    numbers = {**lifting.numbers, **splatting.numbers, **matching.numbers, "run_time_s": seconds}
    settings = {
        "input": job.title,
        "working size": f"{scene.hw[1]}x{scene.hw[0]} px",
        "depth": f"{job.depth.method} ({job.depth.kind})",
        "run time": f"{seconds:.1f} s",
        "threads": str(torch.get_num_threads()),
    }
    write_text(cfg.out / "numbers.json", json.dumps(numbers, indent=2))
    report = cfg.out / "report.html"
    sections = [lifting.section, splatting.section, matching.section]
    write_report(report, f"Lift to Match: {job.title}", sections, settings)
    tell(1.0, "done")
    return DemoResult(report, numbers)


def _job(cfg: DemoCfg) -> _Job:
    sample = None if cfg.image else load_sample(cfg.sample)
    if sample is not None and sample.depth_A is not None:
        return _measured_job(sample)
    image, depth, K = photo_with_depth(cfg)
    return _Job(cfg.image.name if cfg.image else cfg.sample, image, depth, K)


def photo_with_depth(cfg: DemoCfg) -> tuple[Float[Tensor, "h w 3"], Depth, Float[Tensor, "3 3"]]:
    """Read the photo at working size, read or guess its depth, and take a usual lens for its intrinsics."""
    photo = read_image(cfg.image) if cfg.image else load_sample(cfg.sample).image_A
    image = fit_long_side(photo, cfg.max_side)
    hw: HW = (image.shape[0], image.shape[1])
    K = intrinsics(FOCAL_OVER_WIDTH * hw[1], hw)
    if cfg.depth is None:
        return image, estimate_depth(image, "prior", K=K), K
    return image, read_depth(cfg.depth, cfg.depth_kind, scale=cfg.depth_scale).resized(hw), K


def _measured_job(sample: Sample) -> _Job:
    assert sample.image_B is not None and sample.depth_A is not None and sample.valid_A is not None
    assert sample.K_A is not None and sample.K_B is not None and sample.T_A_to_B is not None
    height, width = sample.image_B.shape[:2]
    camera_B = Camera(sample.K_B, sample.T_A_to_B, width=width, height=height)
    depth = Depth(sample.depth_A, sample.valid_A, "metric", "measured")
    truth = {"warp": sample.warp_A_to_B, "covisibility": sample.covisibility_A_to_B}
    return _Job(sample.name, sample.image_A, depth, sample.K_A, camera_B, sample.image_B, **truth)


def _lift_stage(job: _Job, cfg: DemoCfg) -> tuple[LiftedScene, View, _Stage]:
    """Lift the photo to a mesh, render it into camera B, compare with the real photo B where there is one."""
    scene = lift(job.image_A, job.depth, job.K)
    camera_B = job.camera_B or orbit_cameras(scene, 4, 2 * cfg.orbit_radius)[1]
    view = scene.render(camera_B)
    filled = ~view.hole_mask
    numbers = {"lift_filled": filled.float().mean().item()}
    shown = [Number("covered part of the new view", numbers["lift_filled"])]
    pictures = [
        Panel("photo A", job.image_A),
        Panel(
            f"depth ({job.depth.method})", job.depth.depth, "depth", job.depth.valid_mask, _unit(job.depth)
        ),
        Panel("A rendered into camera B", view.image, mask=filled),
    ]
    if job.image_B is not None:
        numbers["lift_psnr_db"] = psnr(view.image, job.image_B, filled)
        numbers["lift_ssim"] = ssim(view.image, job.image_B, filled)
        shown += [
            Number("PSNR against the real photo B", numbers["lift_psnr_db"], "dB", "over the covered pixels"),
            Number(
                "SSIM against the real photo B",
                numbers["lift_ssim"],
                "",
                "over windows that are wholly covered",
            ),
        ]
        error = (view.image - job.image_B).abs().mean(dim=-1)
        pictures += [
            Panel("real photo B", job.image_B),
            Panel("difference", error, "error", filled, "mean |RGB|"),
        ]
    guess = "" if job.depth.method != "prior" else (
        " The depth is a guess from position, segments and sky, made offline without any learned weights: the"
        " geometry is plausible at best. Give a depth file for a true one."
    )  # fmt: skip
    text = (
        "One mesh vertex a pixel, no triangle across a depth discontinuity, rendered with a z-buffer. Grey pixels are"
        " holes: the photo says nothing about them." + guess
    )
    write_image(cfg.out / "mesh_view.png", view.image)
    scene.save(cfg.out / "scene.npz")
    figure = _figure(
        cfg, "lift", figures.panels(*pictures), "The photo, its depth, and the lifted scene from camera B."
    )
    return scene, view, _Stage(Section("1. Lift", text, shown, [figure]), numbers)


def _splat_stage(job: _Job, scene: LiftedScene, camera_B: Camera, cfg: DemoCfg) -> _Stage:
    """Turn the photo into Gaussians with features; splat them into camera B and along an orbit."""
    gaussians, pca = feature_gaussians(job.image_A, job.depth, job.K)
    render = rasterize(gaussians, camera_B)
    assert render.features is not None
    drawn = render.alpha > HOLE_ALPHA
    numbers = {"num_gaussians": float(len(gaussians))}
    shown = [Number("Gaussians", len(gaussians)), Number("feature channels", NUM_FEATURES)]
    if job.image_B is not None:
        numbers["splat_psnr_db"] = psnr(
            render.color, job.image_B, scene.render(camera_B).hole_mask.logical_not()
        )
        note = "over the pixels that the mesh covers"
        shown.append(Number("PSNR against the real photo B", numbers["splat_psnr_db"], "dB", note))
    pictures = figures.panels(
        Panel("splatted colour", render.color, mask=drawn),
        Panel("splatted depth", render.depth, "depth", drawn, _unit(job.depth)),
        Panel("alpha", render.alpha, "certainty", label="accumulated opacity"),
        Panel("features of photo A (PCA)", _photo_feature_colors(job.image_A, pca)),
        Panel("splatted features (same PCA)", pca.colors(render.features), mask=drawn),
    )
    caption = (
        "The Gaussians from camera B. Equal colour means equal feature in the photo and in 3D: one PCA basis."
    )
    animation = _orbit(gaussians, pca, scene, cfg)
    gaussians.save(cfg.out / "gaussians.npz")
    pca.save(cfg.out / "pca.npz")
    moving = Picture(
        animation, "A short orbit: colour and feature colours, splatted on the CPU.", "image/webp"
    )
    text = "One flat Gaussian a pixel, as wide as the pixel's footprint on the surface, carrying colour and features."
    return _Stage(
        Section("2. Splat", text, shown, [_figure(cfg, "splat", pictures, caption), moving]), numbers
    )


def feature_gaussians(
    image: Float[Tensor, "h w 3"], depth: Depth, K: Float[Tensor, "3 3"]
) -> tuple[Gaussians, FeaturePCA]:
    """One Gaussian a pixel that carries the principal components of a dense descriptor, and the PCA basis."""
    descriptors = load_encoder("dense-sift")(image)
    pca = FeaturePCA.fit(descriptors, NUM_FEATURES)
    features = sample_image(pca.project(descriptors), normalized_grid((image.shape[0], image.shape[1])))
    return gaussians_from_depth(image, depth, K, features), pca


def _photo_feature_colors(image: Float[Tensor, "h w 3"], pca: FeaturePCA) -> Float[Tensor, "h w 3"]:
    small = pca.colors(pca.project(load_encoder("dense-sift")(image)))
    return sample_image(small, normalized_grid((image.shape[0], image.shape[1])))


def _orbit(gaussians: Gaussians, pca: FeaturePCA, scene: LiftedScene, cfg: DemoCfg) -> bytes:
    """Animated WebP of colour beside feature colours, at half size."""
    half: HW = (max(1, scene.hw[0] // 2), max(1, scene.hw[1] // 2))
    frames = []
    for camera in orbit_cameras(scene, cfg.orbit_frames, cfg.orbit_radius):
        render = rasterize(gaussians, camera.resized(half))
        assert render.features is not None
        visible = (render.alpha > HOLE_ALPHA)[..., None]
        both = torch.cat([render.color, pca.colors(render.features) * visible], dim=1)
        frames.append(Image.fromarray(to_uint8(both)))
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "WEBP", save_all=True, append_images=frames[1:], duration=80, loop=0, quality=70, method=2
    )
    with atomic_write(cfg.out / "orbit.webp") as file:
        file.write(buffer.getvalue())
    return buffer.getvalue()


def _match_stage(job: _Job, scene: LiftedScene, view_B: View, cfg: DemoCfg) -> _Stage:
    """Match A and B with the classical matchers and compare with the exact correspondence."""
    image_B = view_B.image if job.image_B is None else job.image_B
    warp, covisible = job.warp, job.covisibility
    if warp is None or covisible is None:
        pose = relative_pose(scene.camera.w2c, view_B.camera.w2c)
        warp, covisible = warp_from_depth(
            scene.depth, scene.K, view_B.depth, view_B.camera.K, pose, scene.valid_mask, ~view_B.hole_mask
        )
    numbers, shown, pictures = {}, [], []
    for name in ("dis", "sift"):
        match = load_matcher(name).match(job.image_A, image_B)
        match.save(cfg.out / f"match_{name}.npz")
        measured = compare_with_truth(match, warp, covisible, job.depth.valid_mask)
        numbers |= {f"{name}_{key}": value for key, value in measured.items()}
        shown += [
            Number(f"{name}: median end-point error", measured["epe_px"], "px", "over covisible pixels"),
            *(Number(f"{name}: PCK@{t}", measured[f"pck{t}"], "", f"share under {t} px") for t in (1, 3, 5)),
            Number(
                f"{name}: average precision of certainty",
                measured["ap"],
                "",
                "covisible and right within 10 px",
            ),
            Number(f"{name}: overlap", match.overlap, "", "mean certainty"),
        ]
        pictures.append(_match_figure(cfg, name, job.image_A, image_B, match, warp, covisible))
        matches = match.sample(300, torch.Generator().manual_seed(0))
        lines = figures.matches(job.image_A, image_B, matches, title=f"{name}: {len(matches)} of its matches")
        pictures.append(
            _figure(cfg, f"lines_{name}", lines, f"{name}: sampled matches, coloured by certainty.")
        )
    real = "the real photo B" if job.image_B is not None else "the rendered view B (its holes are black)"
    truth = "the lifted depth" if job.warp is None else "measured disparity"
    text = f"Photo A against {real}; the truth comes from {truth}."
    return _Stage(Section("3. Match", text, shown, pictures), numbers)


def compare_with_truth(
    match: Match,
    warp: Float[Tensor, "h w 2"],
    covisible: Bool[Tensor, "h w"],
    known: Bool[Tensor, "h w"],
) -> dict[str, float]:
    """Median end-point error (px), PCK@1/3/5 over covisible pixels, and average precision of the certainty.

    The certainty is judged over the pixels of A whose truth is ``known``: a pixel counts as positive if it is covisible
    and matched within 10 px.
    """
    matched, certainty = match.query(to_pixel(normalized_grid((warp.shape[0], warp.shape[1])), match.hw_A))
    error = (matched - to_pixel(warp, match.hw_B)).norm(dim=-1)
    seen = error[covisible]
    right = covisible & (error < 10)
    return {
        "epe_px": seen.median().item(),
        **{f"pck{threshold}": pck(seen, threshold) for threshold in (1, 3, 5)},
        "ap": average_precision(certainty[known], right[known]),
    }


def _match_figure(
    cfg: DemoCfg, name: str, image_A: Tensor, image_B: Tensor, match: Match, warp: Tensor, covisible: Tensor
) -> Picture:
    hw: HW = (warp.shape[0], warp.shape[1])
    grid = normalized_grid(hw)
    estimated, certainty = sample_image(match.warp_A_to_B, grid), sample_image(match.certainty_A_to_B, grid)
    error = end_point_error(estimated, warp, match.hw_B)
    figure = figures.panels(
        Panel(f"{name}: B warped into A", sample_image(image_B, estimated), mask=certainty > 0.05),
        Panel("certainty", certainty, "certainty", label="certainty"),
        Panel("end-point error", error, "error", covisible, "px", limits=(0.0, 5.0)),
    )
    caption = (
        f"{name}: B warped into A, its certainty, and the error against the truth (grey: not covisible)."
    )
    return _figure(cfg, f"match_{name}", figure, caption)


def _figure(cfg: DemoCfg, name: str, figure: "figures.Figure", caption: str) -> Picture:
    data = figures.to_png(figure)
    with atomic_write(cfg.out / f"{name}.png") as file:
        file.write(data)
    return Picture(data, caption)


def _unit(depth: Depth) -> str:
    return "depth (m)" if depth.kind == "metric" else "depth (relative)"
