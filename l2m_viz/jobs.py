"""The demo's parts as jobs of their own: one input, one folder of files, lines that say what was written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from l2m_viz.data import atomic_write, read_image, remove_file, write_image
from l2m_viz.encoders import load_encoder
from l2m_viz.errors import FileFormatError, L2MError
from l2m_viz.geometry import HW, normalized_grid, sample_image, sample_warp
from l2m_viz.lifting import sample_cameras
from l2m_viz.matching import Matcher, load_matcher
from l2m_viz.matching.matcher import Precision
from l2m_viz.photo import PhotoCfg, feature_gaussians, lift_photo
from l2m_viz.show import figures
from l2m_viz.show.figures import Panel
from l2m_viz.show.pairs import contact_sheet
from l2m_viz.training.shards import ShardReader, damaged_shards

_SHEET_ROWS = 12  # of pairs under each other: more would not fit a screen


@dataclass(frozen=True)
class MatcherOptions:
    """Which matcher, and what of it a user may choose."""

    # Its name; `l2m matchers` lists them.
    matcher: str = "l2m-tiny"
    # "auto" is the GPU if torch sees one.
    device: str = "auto"
    # A file of weights in place of the published or shipped ones.
    weights: Path | None = None
    # The same of the DINOv2 of a dense network, or of the keypoint detector of a sparse one.
    backbone_weights: Path | None = None
    # Size (H, W) in pixels that a dense network works at, and that of its second pass.
    resolution: HW | None = None
    upsample_resolution: HW | None = None
    # Of a dense network; bfloat16 is faster where the processor has it.
    precision: Precision | None = None
    # Match B after each quarter turn, too, where little of it matches as it is: for pictures that lie on their side.
    turns: bool = False

    def load(self) -> Matcher:
        """Make the matcher.

        Raises:
            L2MError: as `load_matcher`.
        """
        return load_matcher(
            self.matcher,
            self.device,
            self.weights,
            self.backbone_weights,
            self.resolution,
            self.upsample_resolution,
            self.precision,
            turns=self.turns,
        )


def match_to_folder(
    path_A: Path,
    path_B: Path,
    options: MatcherOptions,
    out: Path,
    num: int,
    *,
    hloc: Path | None = None,
    colmap: Path | None = None,
) -> Iterator[str]:
    """Match two files; write match.npz, matches.csv, warped.png and match.png; yield what was done.

    With ``hloc`` or ``colmap`` the pair is added to such files as well, see `Match.to_hloc` and `Match.to_colmap`.
    """
    if num < 1:
        raise L2MError("match", expected="--num of at least 1", got=str(num))
    image_A, image_B = read_image(path_A), read_image(path_B)
    match = options.load().match(image_A, image_B)
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
    if match.turns_B:
        yield f"B was turned by {90 * match.turns_B} degrees counter-clockwise for it; the files are for B as it is"
    if hloc is not None:
        yield f"{match.to_hloc(hloc, path_A.name, path_B.name)} matches for hloc in {hloc}"
    if colmap is not None:
        count = match.to_colmap(colmap, path_A.name, path_B.name)
        yield f"{count} matches in {colmap}; next: colmap geometric_verifier --database_path {colmap}"
    yield f"{rows} matches in {out / 'matches.csv'}; warp and certainty in {out / 'match.npz'}; pictures beside them"


def lift_to_folder(cfg: PhotoCfg, out: Path, views: int, seed: int) -> Iterator[str]:
    """Lift a photo; write scene.npz, gaussians.npz, pca.npz and the views as PNG; yield what was done."""
    if not 0 <= seed < 2**63 or views < 0:
        raise L2MError("lift", expected="0 <= --seed < 2^63, --views >= 0", got=f"seed {seed}, views {views}")
    load_encoder(cfg.encoder)  # an absent one is said before anything of an earlier run is gone
    photo = lift_photo(cfg)
    for old in out.glob("view_*.png"):  # more views of an earlier run would look like this one's
        remove_file(old)
    if photo.depth.method == "prior":
        yield "no depth file: the offline prior guessed it (plausible at best)"
    photo.scene.save(out / "scene.npz")
    cameras = sample_cameras(photo.scene, views, generator=torch.Generator().manual_seed(seed))
    for index, camera in enumerate(cameras):
        view = photo.scene.render(camera)
        write_image(out / f"view_{index}.png", view.image)
        yield f"view {index}: {(~view.hole_mask).float().mean():.0%} covered"
    gaussians, pca = feature_gaussians(photo.scene.image, photo.depth, photo.scene.K, cfg.encoder)
    gaussians.save(out / "gaussians.npz")
    pca.save(out / "pca.npz")
    yield f"{len(gaussians):,} Gaussians; files in {out}"


def inspect_shards(source: Path, num: int, out: Path, verify: bool) -> Iterator[str]:
    """Write a picture of some pairs of a shard, or of a folder of shards; yield what they are.

    Raises:
        FileFormatError: the shard is damaged or foreign; with ``verify``: any shard of the folder is.
    """
    if num < 1:
        raise L2MError("inspect", expected="--num of at least 1", got=str(num))
    require_png(out)
    reader = ShardReader(source)
    if verify:
        _require_whole(source, reader)
        yield f"{source}: every byte of {len(reader)} pairs is as it was written"
    if len(reader) == 0:
        todo = "no shard was finished; run the same `l2m synth` again to go on"
        raise FileFormatError(f"{source}", expected="at least one pair", got="none", todo=todo)
    positions = torch.linspace(0, len(reader) - 1, min(num, len(reader))).round().long().tolist()
    records = [reader.record(position) for position in positions]
    for record in records:
        pair = record.pair
        hw, overlap = tuple(pair.depth_A.shape), pair.overlap
        yield f"pair {record.index}: {hw[0]}x{hw[1]}, overlap {overlap:.2f}, seed {pair.seed}, {record.photo}"
    titles = [f"pair {record.index}\noverlap\n{record.pair.overlap:.0%}" for record in records]
    pairs = [record.pair for record in records]
    side_by_side = -(-len(pairs) // _SHEET_ROWS)
    with atomic_write(out) as file:
        file.write(figures.to_png(contact_sheet(pairs, titles, side_by_side=side_by_side)))
    yield f"{len(reader)} pairs in {source}; picture of {len(records)} in {out}"


def require_png(path: Path) -> None:
    """A figure is written as PNG.

    Raises:
        L2MError: the file's name says something else.
    """
    if path.suffix.lower() != ".png":
        raise L2MError(f"cannot write {path}", expected="a name in .png", got=repr(path.suffix))


def _require_whole(source: Path, reader: ShardReader) -> None:
    if reader.index is None:
        raise L2MError(
            f"--verify {source}", expected="a folder", got="a shard", todo="its index has the hash"
        )
    if damage := damaged_shards(source):
        got = ", ".join(f"{name} {what}" for name, what in damage.items())
        todo = "`l2m synth` with the same settings and `--verify` makes damaged shards again"
        raise FileFormatError(f"{source}", expected="whole shards", got=got, todo=todo)
