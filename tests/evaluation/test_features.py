"""Feature PCK judged by encoders whose answers are known, and by brute force."""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.cli import main
from l2m_viz.encoders import load_encoder
from l2m_viz.encoders.encoder import Encoder
from l2m_viz.errors import ImageError, L2MError, ShapeError
from l2m_viz.evaluation import EvalPair
from l2m_viz.evaluation.features import (
    THRESHOLDS_PX,
    FeaturePckCfg,
    evaluate_features,
    feature_errors_px,
    features_table,
    nearest_cells,
    photo_pairs,
    renamed,
)
from l2m_viz.geometry import normalized_grid, pixel_grid, to_normalized, to_pixel

HW = (48, 80)


class Coordinates(Encoder):
    """Reads the texture's coordinates out of the red and green of a picture that carries them."""

    name, stride, dim = "coordinates", 8, 3

    def _encode(self, image: Float[Tensor, "H W 3"]) -> Tensor:
        cells = image.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).mean(dim=(1, 3))
        # on a sphere: the cosine is larger, the nearer two places of the texture are
        return torch.nn.functional.normalize(
            torch.cat([cells[..., :2] - 0.5, torch.ones_like(cells[..., :1])], -1), dim=-1
        )


class Same(Coordinates):
    """Says the same of everything."""

    name = "same"

    def _encode(self, image: Float[Tensor, "H W 3"]) -> Tensor:
        return torch.ones(image.shape[0] // 8, image.shape[1] // 8, 3)


def texture(shift_px):
    """A picture whose colour is the place on the texture, (x + shift) / 120."""
    places = (pixel_grid(HW) + torch.tensor(shift_px)) / 120
    return torch.cat([places, torch.zeros(*HW, 1)], dim=-1)


def shifted_pair(shift_px=(16.0, 8.0), benchmark="texture"):
    """B looks at the texture from further right and below; what A sees there lies further left and up in B."""
    target = pixel_grid(HW) - torch.tensor(shift_px)
    covisible = ((target > 0) & (target < torch.tensor([80.0, 48.0]))).all(dim=-1)
    return EvalPair(
        benchmark, "a-b", texture((0.0, 0.0)), texture(shift_px), to_normalized(target, HW), covisible,
        torch.ones_like(covisible),
    )  # fmt: skip


def test_features_that_tell_the_place_find_it():
    errors_px = feature_errors_px(Coordinates(), shifted_pair(), 320)
    assert len(errors_px) == 5 * 8  # of 6 x 10 cells, one row and two columns are not seen by B
    torch.testing.assert_close(errors_px, torch.zeros(40), atol=1e-3, rtol=0)


def test_errors_are_measured_from_the_truth_in_pixels_of_b():
    # half a cell apart: the nearest cell's centre is 4 px off in x
    errors_px = feature_errors_px(Coordinates(), shifted_pair((12.0, 8.0)), 320)
    torch.testing.assert_close(errors_px, torch.full_like(errors_px, 4.0), atol=1e-2, rtol=0)


def test_features_that_tell_nothing_point_at_the_first_cell():
    pair = shifted_pair()
    errors_px = feature_errors_px(Same(), pair, 320)
    centers = pixel_grid((6, 10)) * 8
    seen = ((centers - torch.tensor([16.0, 8.0])) > 0).all(dim=-1)
    expected = (centers[seen] - torch.tensor([16.0, 8.0]) - 4).norm(dim=-1)
    torch.testing.assert_close(errors_px, expected, atol=1e-3, rtol=0)


def test_nearest_cells_by_brute_force():
    draw = torch.Generator().manual_seed(0)
    rows, grid = torch.randn(9, 5, generator=draw), torch.randn(4, 7, 5, generator=draw)
    found = to_pixel(nearest_cells(rows, 3 * grid), (4, 7))
    for row, place in zip(rows, found, strict=True):
        best, where = -2.0, None
        for y in range(4):
            for x in range(7):
                cosine = (row @ grid[y, x] / row.norm() / grid[y, x].norm()).item()
                if cosine > best:
                    best, where = cosine, (x + 0.5, y + 0.5)
        assert place.tolist() == pytest.approx(where, abs=1e-5)
    assert nearest_cells(rows, grid).shape == (9, 2)
    assert normalized_grid((4, 7)).abs().max() < 1
    with pytest.raises(ShapeError, match="5 and 3 channels"):
        nearest_cells(rows, grid[..., :3])


def test_the_working_size_is_the_one_of_the_thresholds():
    pair = shifted_pair((12.0, 8.0))
    (whole,) = evaluate_features(Same(), [pair])
    (half,) = evaluate_features(Same(), [pair], FeaturePckCfg(long_side=40))
    assert half.median_px == pytest.approx(whole.median_px / 2, rel=0.25)


def test_means_over_pairs_and_benchmarks_apart():
    nowhere = shifted_pair((1000.0, 0.0), "nothing")
    pairs = [shifted_pair(), shifted_pair((12.0, 8.0)), shifted_pair(benchmark="other"), nowhere]
    results = evaluate_features(Coordinates(), pairs)
    assert [(r.benchmark, r.num_pairs) for r in results] == [("texture", 2), ("other", 1)]
    assert results[0].median_px == pytest.approx(2.0, abs=0.01)  # of 0 and 4
    assert results[0].pck == (1.0, 1.0, 1.0)
    errors_px = feature_errors_px(Same(), shifted_pair(), 320)
    (same,) = evaluate_features(Same(), [shifted_pair()])
    assert same.pck == pytest.approx([(errors_px < t).float().mean().item() for t in THRESHOLDS_PX])
    with pytest.raises(L2MError, match="a covisible cell"):
        evaluate_features(Same(), [nowhere])


def test_the_table_has_a_line_an_encoder_and_benchmark():
    results = evaluate_features(Coordinates(), [shifted_pair()])
    table = features_table(results + renamed(results, "other name"))
    assert "| texture | coordinates | 1 | 0.0 | 1.000 | 1.000 | 1.000 |" in table
    assert "| texture | other name | 1 |" in table


def test_pairs_of_photos_are_the_same_every_time(photos):
    cfg = FeaturePckCfg(num_photo_pairs=2, hw=(64, 96))
    once, twice = photo_pairs(photos, cfg), photo_pairs(photos, cfg)
    assert [pair.title for pair in once] == [pair.title for pair in twice]
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a.image_B, b.image_B)
        assert a.covisibility_A_to_B.any()
    with pytest.raises(ImageError, match="no such folder"):
        photo_pairs(photos / "none", cfg)


def test_sift_finds_more_than_chance(photos):
    cfg = FeaturePckCfg(num_photo_pairs=4, hw=(96, 128), difficulty=(0.2, 0.4))
    pairs = photo_pairs(photos, cfg)
    (sift,) = evaluate_features(load_encoder("dense-sift"), pairs, cfg)
    (chance,) = evaluate_features(Same(), pairs, cfg)
    assert sift.pck[0] > 3 * max(chance.pck[0], 0.05)


def test_the_command_writes_table_and_picture(photos, tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "features.md", tmp_path / "features.png"
    monkeypatch.setattr(
        "sys.argv",
        ["l2m", "eval", "features", "--photos", str(photos), "--encoder", "dense-sift", "--num", "2",
         "--out", str(out), "--picture", str(picture)],
    )  # fmt: skip
    main()
    assert "| photos | dense-sift | 2 |" in out.read_text()
    assert "| photos | dense-sift | 2 |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
