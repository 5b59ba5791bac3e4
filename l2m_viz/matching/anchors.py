"""From scores over a grid of anchors in the other image to a warp (RoMa's regression by classification)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from l2m_viz.constants import constant
from l2m_viz.geometry import HW, normalized_grid

Neighborhood = Literal["cross", "square"]

# (rows, columns) from the best anchor
_STEPS: dict[Neighborhood, list[tuple[int, int]]] = {
    "cross": [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)],
    "square": [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)],
}


def anchors_to_warp(
    logits: Float[Tensor, "b a h w"],
    anchor_hw: HW,
    neighborhood: Neighborhood = "cross",
    *,
    wrap: bool = False,
) -> Float[Tensor, "b 2 h w"]:
    """Return each cell's best anchor, refined by the probabilities of the anchors around it.

    The mean over all anchors would land between the modes of an ambiguous cell; the mean over the best one and its
    neighbours does not, and is finer than the grid (Edstedt et al., RoMa, CVPR 2024).

    Args:
        logits: Scores of the anchors, row by row, of every cell.
        anchor_hw: Rows and columns of the anchors.
        neighborhood: The anchors that count: the best and the four beside it, or the eight around it.
        wrap: Take neighbours by index, so that the one to the right of a row's last anchor is the first of the next
            row: a slip of the official code that its weights were trained with. Otherwise what is beyond the border
            does not exist.
    """
    best = logits.argmax(dim=1, keepdim=True)  # [b 1 h w]
    steps = torch.stack(
        [constant(axis, logits.device, torch.int64) for axis in zip(*_STEPS[neighborhood], strict=True)],
        dim=1,
    )
    index, exists = (_by_index if wrap else _on_grid)(best, anchor_hw, steps)  # both [b k h w]
    weight = logits.gather(1, index).masked_fill(~exists, -torch.inf).softmax(dim=1)
    centers = normalized_grid(anchor_hw, device=logits.device, dtype=logits.dtype).reshape(-1, 2)
    return (weight[..., None] * centers[index]).sum(dim=1).permute(0, 3, 1, 2)


def _on_grid(
    best: Int64[Tensor, "b 1 h w"], anchor_hw: HW, steps: Int64[Tensor, "k 2"]
) -> tuple[Int64[Tensor, "b k h w"], Bool[Tensor, "b k h w"]]:
    """Indices of the anchors at these steps from the best, and whether they are on the grid."""
    rows, columns = steps.T[..., None, None].unbind()  # [k 1 1] each
    row, column = best // anchor_hw[1] + rows, best % anchor_hw[1] + columns  # [b k h w]
    exists = (row >= 0) & (row < anchor_hw[0]) & (column >= 0) & (column < anchor_hw[1])
    return torch.where(exists, row * anchor_hw[1] + column, best), exists


def _by_index(
    best: Int64[Tensor, "b 1 h w"], anchor_hw: HW, steps: Int64[Tensor, "k 2"]
) -> tuple[Int64[Tensor, "b k h w"], Bool[Tensor, "b k h w"]]:
    offsets = steps[:, 0] * anchor_hw[1] + steps[:, 1]
    index = (best + offsets[:, None, None]).clamp(0, anchor_hw[0] * anchor_hw[1] - 1)
    return index, torch.ones_like(index, dtype=torch.bool)
