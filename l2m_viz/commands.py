"""The commands of `l2m`: thin wrappers of the public functions, by tyro."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from l2m_viz.demo import DemoCfg, run_demo
from l2m_viz.jobs import lift_to_folder, match_to_folder
from l2m_viz.matching import list_matchers
from l2m_viz.photo import PhotoCfg

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
    image_a: _Path, image_b: _Path, matcher: str = "dis", out: Path = Path("outputs/match"), num: int = 5000
) -> None:
    """Match two images: warp and certainty as npz, sampled matches as CSV, pictures.

    Args:
        image_a: Image A.
        image_b: Image B.
        matcher: Which matcher; `l2m matchers` lists them.
        out: Folder for the files.
        num: Number of sampled matches.
    """
    for line in match_to_folder(image_a, image_b, matcher, out, num):
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
def matchers() -> None:
    """List the matchers that run here."""
    for info in list_matchers():
        print(f"{info.name:8} {info.kind:8} {info.summary}")
