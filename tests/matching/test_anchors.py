import math

import numpy as np
import pytest
import torch

from l2m_viz.geometry import normalized_grid
from l2m_viz.matching.anchors import anchors_to_warp


def test_official_output_is_reproduced(golden):
    official = golden("anchors_to_warp")
    warp = anchors_to_warp(torch.from_numpy(official["in.logits"]), (64, 64), wrap=True)
    np.testing.assert_allclose(warp.permute(0, 2, 3, 1), official["out.flow"], atol=1e-5)


@pytest.mark.parametrize("neighborhood", ["cross", "square"])
def test_one_certain_anchor_is_the_answer(neighborhood):
    logits = torch.zeros(1, 3 * 5, 1, 1)
    logits[0, 1 * 5 + 2] = 100.0
    warp = anchors_to_warp(logits, (3, 5), neighborhood=neighborhood)
    torch.testing.assert_close(warp[0, :, 0, 0], normalized_grid((3, 5))[1, 2])


def test_two_neighbours_are_weighed_by_probability():
    logits = torch.full((1, 3 * 5, 1, 1), -100.0)
    logits[0, 7], logits[0, 8] = math.log(0.75), math.log(0.25)  # columns 2 and 3 of row 1, at x = 0 and 0.4
    warp = anchors_to_warp(logits, (3, 5), neighborhood="cross")
    torch.testing.assert_close(warp[0, :, 0, 0], torch.tensor([0.1, 0.0]))


def test_row_ends_do_not_wrap_unless_asked():
    logits = torch.full((1, 3 * 5, 1, 1), -100.0)
    logits[0, 4], logits[0, 5] = 1.0, 0.99  # last column of row 0, first column of row 1: not neighbours
    own = anchors_to_warp(logits, (3, 5), neighborhood="cross")
    torch.testing.assert_close(own[0, :, 0, 0], normalized_grid((3, 5))[0, 4])
    official = anchors_to_warp(logits, (3, 5), neighborhood="cross", wrap=True)
    assert official[0, 0, 0, 0] < 0.1


def test_a_diagonal_neighbour_counts_in_the_square_only():
    logits = torch.full((1, 3 * 5, 1, 1), -100.0)
    logits[0, 7] = logits[0, 13] = 0.0  # (1, 2) and (2, 3)
    logits[0, 7] += 1e-3
    cross = anchors_to_warp(logits, (3, 5), neighborhood="cross")
    square = anchors_to_warp(logits, (3, 5), neighborhood="square")
    torch.testing.assert_close(cross[0, :, 0, 0], torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(square[0, :, 0, 0], torch.tensor([0.2, 1 / 3]), atol=1e-3, rtol=0)
