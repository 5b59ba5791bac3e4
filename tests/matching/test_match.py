"""The `Match` type on warps whose answers are known: a homography, a shift, nothing."""

import csv

import pytest
import torch

from l2m_viz.errors import FileFormatError, L2MError, ShapeError
from l2m_viz.geometry import normalized_grid, sample_image, to_normalized, to_pixel
from l2m_viz.matching import Match, Matches

HW_A, HW_B = (48, 64), (60, 50)


def _affine_match(certainty_A: torch.Tensor | None = None) -> Match:
    """B is A scaled by 0.8 and moved, in normalised coordinates; both warps are exact."""
    grid_A, grid_B = normalized_grid((24, 32)), normalized_grid((30, 25))
    shift = torch.tensor([0.1, -0.05])
    there, back = grid_A * 0.8 + shift, (grid_B - shift) / 0.8
    certainty_B = (back.abs() <= 1).all(-1).float()
    return Match(
        there,
        torch.ones(24, 32) if certainty_A is None else certainty_A,
        back.clamp(-1, 1),
        certainty_B,
        HW_A,
        HW_B,
    )


def _truth(points_A: torch.Tensor) -> torch.Tensor:
    return to_pixel(to_normalized(points_A, HW_A) * 0.8 + torch.tensor([0.1, -0.05]), HW_B)


def test_query_is_exact_between_pixels_in_original_pixels():
    points = torch.tensor([[10.3, 20.7], [33.0, 5.5]])
    answer, certainty = _affine_match().query(points)
    torch.testing.assert_close(answer, _truth(points), atol=1e-3, rtol=0)
    assert certainty.tolist() == [1.0, 1.0]


def test_query_there_and_back():
    points = torch.tensor([[[20.0, 20.0], [40.0, 30.0]]])
    there, _ = _affine_match().query(points)
    back, _ = _affine_match().query(there, "B_to_A")
    torch.testing.assert_close(back, points, atol=1e-2, rtol=0)


def test_query_at_the_warp_grid_returns_the_warp():
    match = _affine_match()
    answer, _ = match.query(to_pixel(normalized_grid((24, 32)), HW_A))
    torch.testing.assert_close(to_normalized(answer, HW_B), match.warp_A_to_B, atol=1e-5, rtol=0)


def test_a_coarse_identity_warp_is_the_identity_up_to_the_border():
    grid = normalized_grid((4, 6))
    match = Match(grid, torch.ones(4, 6), grid, torch.ones(4, 6), (400, 600), (400, 600))
    points = torch.tensor([[0.0, 0.0], [600.0, 400.0], [3.0, 250.0], [599.0, 1.0]])
    answer, certainty = match.query(points)
    torch.testing.assert_close(answer, points, atol=1e-3, rtol=0)
    assert certainty.tolist() == [1.0] * 4
    assert match.cycle_error().max() < 1e-3


def test_no_points_no_answer():
    answer, certainty = _affine_match().query(torch.zeros(0, 2))
    assert (answer.shape, certainty.shape) == ((0, 2), (0,))


def test_points_outside_are_finite_clamped_and_uncertain():
    answer, certainty = _affine_match().query(torch.tensor([[-500.0, 10.0], [1e6, 1e6]]))
    assert torch.isfinite(answer).all()
    assert ((answer >= 0) & (answer <= torch.tensor([50.0, 60.0]))).all()
    assert certainty.tolist() == [0.0, 0.0]


def test_samples_lie_on_the_truth_and_inside_both_images():
    matches = _affine_match().sample(500, torch.Generator().manual_seed(0))
    assert len(matches) == 500
    torch.testing.assert_close(matches.points_B, _truth(matches.points_A), atol=1e-2, rtol=0)
    assert ((matches.points_A >= 0) & (matches.points_A <= torch.tensor([64.0, 48.0]))).all()


def test_sampling_is_reproducible_without_repetition_and_never_too_many():
    match = _affine_match()
    first, second = (match.sample(400, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.points_A, second.points_A)
    assert len(torch.unique(torch.cat([first.points_A, first.points_B], 1), dim=0)) == 400
    assert len(match.sample(10**6)) == 24 * 32 + int(match.certainty_B_to_A.sum())
    assert len(match.sample(0)) == 0
    with pytest.raises(L2MError, match="num"):
        match.sample(-1)


def test_uncertain_pixels_are_never_sampled_and_none_is_no_error():
    certainty = torch.zeros(24, 32)
    certainty[:, :8] = 0.9
    only_left = Match(*_some(certainty), HW_A, HW_B)
    assert (only_left.sample(300).points_A[:, 0] < 16).all()
    nothing = Match(*_some(torch.zeros(24, 32)), HW_A, HW_B)
    assert len(nothing.sample(100)) == 0
    assert nothing.overlap == 0


def _some(certainty: torch.Tensor):
    match = _affine_match()
    return match.warp_A_to_B, certainty, match.warp_B_to_A, torch.zeros_like(match.certainty_B_to_A)


def test_balanced_sampling_evens_out_a_crowd():
    """All of the left half of A lands on one spot of B: the joint density there is high, so it is thinned."""
    warp = normalized_grid((60, 80))
    crowded = warp[..., 0] < 0
    warp = torch.where(crowded[..., None], warp * 0.05 - 0.5, warp)
    match = Match(warp, torch.ones(60, 80), normalized_grid((4, 5)), torch.zeros(4, 5), (60, 80), (60, 80))
    drawn = match.sample(600, torch.Generator().manual_seed(0))
    share = (drawn.points_A[:, 0] < 40).float().mean()
    assert 0.05 < share < 0.45


def test_cycle_error_is_zero_for_exact_warps_and_the_shift_for_a_shifted_one():
    match = _affine_match()
    assert match.cycle_error()[3:-3, 3:-3].max() < 0.05
    shifted = Match(
        match.warp_A_to_B + torch.tensor([2 * 3.0 * 0.8 / 64, 0.0]), match.certainty_A_to_B,
        match.warp_B_to_A, match.certainty_B_to_A, HW_A, HW_B,
    )  # fmt: skip
    torch.testing.assert_close(
        shifted.cycle_error()[5:-5, 5:-8], torch.full((14, 19), 3.0), atol=0.05, rtol=0
    )


def test_save_load_and_csv(tmp_path):
    match = _affine_match()
    match.save(tmp_path / "m.npz")
    loaded = Match.load(tmp_path / "m.npz")
    assert torch.equal(loaded.warp_A_to_B, match.warp_A_to_B)
    assert (loaded.hw_A, loaded.hw_B, loaded.keypoints_A) == (HW_A, HW_B, None)
    assert match.to_csv(tmp_path / "m.csv", num=20) == 20
    rows = list(csv.DictReader((tmp_path / "m.csv").read_text().splitlines()))
    point = torch.tensor([[float(rows[0]["x_A_px"]), float(rows[0]["y_A_px"])]])
    expected = torch.tensor([[float(rows[0]["x_B_px"]), float(rows[0]["y_B_px"])]])
    torch.testing.assert_close(_truth(point), expected, atol=1e-2, rtol=0)
    with pytest.raises(FileFormatError, match="Matches"):
        Matches.load(tmp_path / "m.npz")


def test_sparse_keypoints_come_back_unrounded_best_first():
    match = _affine_match()
    points = torch.tensor([[1.25, 2.5], [3.75, 4.125], [5.0, 6.0]])
    sparse = Match(
        match.warp_A_to_B, match.certainty_A_to_B, match.warp_B_to_A, match.certainty_B_to_A, HW_A, HW_B,
        "x", points, points + 1, torch.tensor([0.2, 0.9, 0.5]),
    )  # fmt: skip
    assert torch.equal(sparse.sample(2).points_A, points[[1, 2]])
    assert torch.equal(sparse.sample(9).points_B, points[[1, 2, 0]] + 1)


def test_errors(unchecked):
    match = _affine_match()
    with pytest.raises(ShapeError, match=r"\(x, y\)"):
        match.query(torch.zeros(4, 3))
    with pytest.raises(L2MError, match="NaN"):
        match.query(torch.tensor([[float("nan"), 0.0]]))
    for nonsense in ("a", None, [[1.0, 2.0], [3.0]]):
        with pytest.raises(ShapeError, match="points"):
            match.query(nonsense)
    with pytest.raises(L2MError, match="num"):
        match.sample(2.5)
    with pytest.raises(ShapeError, match="certainty"):
        Match(match.warp_A_to_B, torch.ones(3, 3), match.warp_B_to_A, match.certainty_B_to_A, HW_A, HW_B)
    with pytest.raises(L2MError, match="NaN"):
        Match(
            match.warp_A_to_B * torch.nan,
            match.certainty_A_to_B,
            match.warp_B_to_A,
            match.certainty_B_to_A,
            HW_A,
            HW_B,
        )
    with pytest.raises(L2MError, match="direction"):
        match.query(torch.zeros(1, 2), "sideways")


def test_warping_by_sampling_reproduces_the_other_image():
    match = _affine_match()
    image_B = torch.rand(*HW_B, generator=torch.Generator().manual_seed(1))
    warped = sample_image(image_B, match.warp_A_to_B)
    by_query = sample_image(
        image_B, to_normalized(match.query(to_pixel(normalized_grid((24, 32)), HW_A))[0], HW_B)
    )
    torch.testing.assert_close(warped, by_query, atol=1e-4, rtol=0)


def _plain(**changes):
    warp, certainty = torch.zeros(3, 4, 2), torch.ones(3, 4)
    fields = {
        "warp_A_to_B": warp,
        "certainty_A_to_B": certainty,
        "warp_B_to_A": warp,
        "certainty_B_to_A": certainty,
    }
    return Match(**(fields | {"hw_A": (30, 40), "hw_B": (30, 40)} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"certainty_A_to_B": torch.full((3, 4), 7.0)}, "from 0 to 1"),
        ({"warp_B_to_A": torch.zeros(3, 4, 2, dtype=torch.float64)}, "float32"),
        ({"hw_A": 5}, r"\(H, W\)"),
        ({"hw_B": None}, r"\(H, W\)"),
        ({"hw_A": (True, 3)}, r"\(H, W\)"),
        ({"keypoints_A": torch.zeros(3, 2)}, "or none of them"),
        (
            {
                "keypoints_A": torch.zeros(3, 2),
                "keypoints_B": torch.zeros(5, 2),
                "keypoint_certainty": torch.ones(3),
            },
            "or none of them",
        ),
        (
            {
                "keypoints_A": torch.full((3, 2), torch.nan),
                "keypoints_B": torch.zeros(3, 2),
                "keypoint_certainty": torch.ones(3),
            },
            "finite",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_strangers_file_may_hold_is_refused(unchecked, changes, message):
    assert _plain().overlap == 1
    with pytest.raises(L2MError, match=message):
        _plain(**changes)
