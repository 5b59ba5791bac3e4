"""Quarter turns of B are found and taken back: what the answer is, the pictures themselves say."""

from dataclasses import replace

import pytest
import torch

from l2m_viz import load_matcher, load_sample
from l2m_viz.geometry import pixel_grid, sample_image, sample_warp, to_normalized, to_pixel
from l2m_viz.matching import Match, Stage
from l2m_viz.matching.matcher import Matcher
from l2m_viz.matching.turned import TurnedMatcher, turned_back

HW_A, HW_B = (20, 36), (24, 44)
TURNS = pytest.mark.parametrize("turns", [1, 2, 3])


def turned_hw(turns: int) -> tuple[int, int]:
    height, width = HW_B
    return HW_B if turns == 2 else (width, height)


@pytest.fixture
def image_B() -> torch.Tensor:
    """Red says where a pixel is from left to right, green from top to bottom."""
    x, y = to_normalized(pixel_grid(HW_B), HW_B).unbind(-1)
    return torch.stack([x, y], dim=-1)


def found_in(hw_B: tuple[int, int], generator: torch.Generator) -> Match:
    """Anything that a matcher could say of A and a picture of that size, at another resolution than theirs."""
    (rows_A, columns_A), (rows_B, columns_B) = (10, 18), (hw_B[0] // 2, hw_B[1] // 2)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    warp_A_to_B, warp_B_to_A = (
        1.8 * uniform(*hw, 2) - 0.9 for hw in ((rows_A, columns_A), (rows_B, columns_B))
    )
    stage = Stage(
        2, warp_A_to_B, uniform(rows_A, columns_A), warp_B_to_A, uniform(rows_B, columns_B),
        uniform(rows_A, columns_A, 2), uniform(rows_B, columns_B, 2),
        uniform(rows_A, columns_A, rows_B // 2, columns_B // 2), uniform(rows_B, columns_B, 5, 9),
    )  # fmt: skip
    keypoints = uniform(7, 2) * torch.tensor(HW_A[::-1]), uniform(7, 2) * torch.tensor(hw_B[::-1])
    maps = (stage.warp_A_to_B, stage.certainty_A_to_B, stage.warp_B_to_A, stage.certainty_B_to_A)
    return Match(*maps, HW_A, hw_B, "some", *keypoints, uniform(7), (stage,))


@TURNS
def test_what_was_found_in_the_turned_picture_is_found_in_the_picture(image_B, turns):
    turned_B = torch.rot90(image_B, turns)
    match = found_in(turned_hw(turns), torch.Generator().manual_seed(turns))
    back = turned_back(match, turns)
    assert back.hw_B == HW_B
    assert back.hw_A == HW_A
    # Inside only: beyond the outermost cells of a warp, pixels are taken to move as the cells do, upright or turned.
    points_A, inside_B = pixel_grid(HW_A)[1:-1, 1:-1], pixel_grid(HW_B)[1:-1, 1:-1]
    (there, certainty), (same, same_certainty) = (found.query(points_A) for found in (match, back))
    shown = sample_image(turned_B, to_normalized(there, match.hw_B))
    torch.testing.assert_close(sample_image(image_B, to_normalized(same, HW_B)), shown, atol=1e-4, rtol=0)
    torch.testing.assert_close(same_certainty, certainty)
    # the other way: a pixel of B goes where the same pixel of the turned B goes
    from_turned, turned_certainty = match.query(pixel_grid(match.hw_B)[1:-1, 1:-1], "B_to_A")
    from_B, certainty_B = back.query(inside_B, "B_to_A")
    torch.testing.assert_close(torch.rot90(from_B, turns), from_turned, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.rot90(certainty_B, turns), turned_certainty, atol=1e-5, rtol=0)


@TURNS
def test_keypoints_stay_on_what_they_lie_on(image_B, turns):
    match = found_in(turned_hw(turns), torch.Generator().manual_seed(turns))
    back = turned_back(match, turns)
    assert match.keypoints_B is not None
    assert back.keypoints_B is not None
    before = sample_image(torch.rot90(image_B, turns), to_normalized(match.keypoints_B, match.hw_B))
    after = sample_image(image_B, to_normalized(back.keypoints_B, HW_B))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    assert back.keypoints_A is match.keypoints_A


@TURNS
def test_every_map_of_a_stage_is_turned_back(turns):
    match = found_in(turned_hw(turns), torch.Generator().manual_seed(turns))
    (stage,), (back,) = match.stages, turned_back(match, turns).stages
    assert stage.displacement is not None
    torch.testing.assert_close(back.warp_A_to_B, turned_back(match, turns).warp_A_to_B)
    torch.testing.assert_close(torch.rot90(back.warp_B_to_A, turns), stage.warp_B_to_A)
    torch.testing.assert_close(torch.rot90(back.certainty_B_to_A, turns), stage.certainty_B_to_A)
    torch.testing.assert_close(torch.rot90(back.displacement_B_to_A, turns), stage.displacement_B_to_A)
    torch.testing.assert_close(torch.rot90(back.anchor_probs_B_to_A, turns), stage.anchor_probs_B_to_A)
    # a displacement is the difference of two places
    start = replace(stage, warp_A_to_B=stage.warp_A_to_B - stage.displacement)
    before = turned_back(replace(match, stages=(start,)), turns).stages[0]
    torch.testing.assert_close(back.displacement, back.warp_A_to_B - before.warp_A_to_B, atol=1e-5, rtol=1e-5)
    # the likeliest anchor is the same piece of B
    for i, j in ((0, 0), (9, 17), (4, 5)):
        assert torch.equal(torch.rot90(back.anchor_probs[i, j], turns), stage.anchor_probs[i, j])


class _Asked(Matcher):
    """Says what it is told to, and remembers what it was asked."""

    name = "asked"

    def __init__(self, certainties: list[float]) -> None:
        self.certainties, self.seen = certainties, []

    def _match_pair(self, image_A, image_B):
        certainty = self.certainties[len(self.seen)]
        self.seen.append(image_B)
        maps = [
            map_
            for image in (image_A, image_B)
            for map_ in (torch.zeros(*image.shape[:2], 2), torch.full(image.shape[:2], certainty))
        ]
        return Match(*maps, tuple(image_A.shape[:2]), tuple(image_B.shape[:2]), self.name)


@pytest.mark.parametrize(
    ("certainties", "best", "turns"),
    [([0.2], 0.2, 0), ([0.01, 0.02, 0.6, 0.3], 0.6, 3), ([0.03, 0.01, 0.09, 0.0], 0.03, 0)],
    ids=["upright", "turned", "unrelated"],
)
def test_turns_are_tried_only_where_little_is_found(certainties, best, turns):
    inner = _Asked(certainties)
    image_A, image_B = torch.rand(*HW_A, 3), torch.rand(*HW_B, 3)
    match = TurnedMatcher(inner).match(image_A, image_B)
    assert len(inner.seen) == len(certainties)
    assert match.overlap == pytest.approx(best)
    assert match.hw_B == HW_B
    assert match.turns_B == turns
    expected = [torch.rot90(image_B, turns) for turns in (0, 1, 3, 2)]
    assert all(torch.equal(a, b) for a, b in zip(inner.seen, expected, strict=False))


@pytest.mark.parametrize("turns", [1, 2])
def test_l2m_tiny_finds_a_photo_that_lies_on_its_side(turns):
    sample = load_sample("motorcycle")
    image_A, image_B = sample.image_A[:, :700], sample.image_B
    plain, turning = load_matcher("l2m-tiny"), load_matcher("l2m-tiny", turns=True)
    upright = plain.match(image_A, image_B)
    lying = torch.rot90(image_B, turns)
    assert plain.match(image_A, lying).overlap < 0.05  # it needs the turn
    still, found = turning.match([image_A, image_A], [image_B, lying], stages=True)  # in their order
    torch.testing.assert_close(still.warp_A_to_B, upright.warp_A_to_B)
    assert (still.turns_B, found.turns_B) == (0, 4 - turns)
    first, *refiners = found.stages
    assert first.displacement is None
    in_lying_B = torch.rot90(still.stages[0].anchor_probs, turns, dims=(2, 3))
    torch.testing.assert_close(first.anchor_probs, in_lying_B, atol=1e-3, rtol=0)
    assert all(stage.anchor_probs is None and stage.displacement is not None for stage in refiners)
    assert found.overlap == pytest.approx(upright.overlap, abs=1e-3)
    height, width = image_B.shape[:2]
    warp = sample_warp(upright.warp_A_to_B, to_normalized(pixel_grid((50, 70)), (50, 70)))
    x, y = to_pixel(warp, (height, width)).unbind(-1)
    for _ in range(turns):  # torch.rot90 takes the right border to the top
        x, y, width, height = y, width - x, height, width
    same = to_pixel(sample_warp(found.warp_A_to_B, to_normalized(pixel_grid((50, 70)), (50, 70))), found.hw_B)
    torch.testing.assert_close(same, torch.stack([x, y], dim=-1), atol=1e-2, rtol=0)
    assert turning.name == "l2m-tiny"
