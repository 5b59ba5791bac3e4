"""The demo's parts as jobs of their own: one input, one folder of files, lines that say what was written."""

from collections.abc import Iterator
from pathlib import Path

import torch

from l2m_viz.data import atomic_write, read_image, remove_file, write_image
from l2m_viz.errors import L2MError
from l2m_viz.geometry import normalized_grid, sample_image, sample_warp
from l2m_viz.lifting import sample_cameras
from l2m_viz.matching import load_matcher
from l2m_viz.photo import PhotoCfg, feature_gaussians, lift_photo
from l2m_viz.show import figures
from l2m_viz.show.figures import Panel


def match_to_folder(path_A: Path, path_B: Path, matcher: str, out: Path, num: int) -> Iterator[str]:
    """Match two files; write match.npz, matches.csv, warped.png and match.png; yield what was done."""
    if num < 1:
        raise L2MError("match", expected="--num of at least 1", got=str(num))
    image_A, image_B = read_image(path_A), read_image(path_B)
    match = load_matcher(matcher).match(image_A, image_B)
    match.save(out / "match.npz")
    rows = match.to_csv(out / "matches.csv", num, torch.Generator().manual_seed(0))
    grid = normalized_grid(match.hw_A)
    certainty = sample_image(match.certainty_A_to_B, grid)
    warped = sample_image(image_B, sample_warp(match.warp_A_to_B, grid))
    write_image(out / "warped.png", warped)
    matches = match.sample(num, torch.Generator().manual_seed(0))
    pictures = {
        "match.png": figures.panels(
            Panel("A", image_A),
            Panel("B warped into A", warped, mask=certainty > 0.05),
            Panel("certainty", certainty, "certainty", label="certainty"),
        ),
        "lines.png": figures.matches(image_A, image_B, matches),
    }
    for name, figure in pictures.items():
        with atomic_write(out / name) as file:
            file.write(figures.to_png(figure))
    yield f"overlap {match.overlap:.3f} (mean certainty; near 0: the images do not show the same thing)"
    yield f"{rows} matches in {out / 'matches.csv'}; warp and certainty in {out / 'match.npz'}; pictures beside them"


def lift_to_folder(cfg: PhotoCfg, out: Path, views: int, seed: int) -> Iterator[str]:
    """Lift a photo; write scene.npz, gaussians.npz, pca.npz and the views as PNG; yield what was done."""
    if not 0 <= seed < 2**63 or views < 0:
        raise L2MError("lift", expected="0 <= --seed < 2^63, --views >= 0", got=f"seed {seed}, views {views}")
    for old in out.glob("view_*.png"):  # more views of an earlier run would look like this one's
        remove_file(old)
    photo = lift_photo(cfg)
    if photo.depth.method == "prior":
        yield "no depth file: the offline prior guessed it (plausible at best)"
    photo.scene.save(out / "scene.npz")
    cameras = sample_cameras(photo.scene, views, generator=torch.Generator().manual_seed(seed))
    for index, camera in enumerate(cameras):
        view = photo.scene.render(camera)
        write_image(out / f"view_{index}.png", view.image)
        yield f"view {index}: {(~view.hole_mask).float().mean():.0%} covered"
    gaussians, pca = feature_gaussians(photo.scene.image, photo.depth, photo.scene.K)
    gaussians.save(out / "gaussians.npz")
    pca.save(out / "pca.npz")
    yield f"{len(gaussians):,} Gaussians; files in {out}"
