"""Any matcher, also for pictures that were taken with the camera on its side or upside down.

A network that has seen upright scenes finds nothing in a picture that is turned against the other by a quarter, and
says so by its overlap. So image B is matched as it is, and if little is found, after each quarter turn; the turn with
the highest overlap is taken back in the result. Which of the two lies on its side makes no difference: turning both
changes little (l2m-tiny, views of held-out photos: mean overlap 0.44 both upright, 0.43 both on their side, 0.01
apart).
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.geometry import to_normalized, to_pixel
from l2m_viz.matching.match import NO_OVERLAP, Match, Stage
from l2m_viz.matching.matcher import ImagePair, Matcher

_TURNS = (1, 3, 2)  # quarter turns counter-clockwise, the frequent ones first

_Result = TypeVar("_Result", Match, Stage)


class TurnedMatcher(Matcher):
    """Another matcher, which is given image B in up to four orientations."""

    def __init__(self, matcher: Matcher) -> None:
        self.name = matcher.name
        self._matcher = matcher

    def _match_pair(self, image_A: Float[Tensor, "ha wa 3"], image_B: Float[Tensor, "hb wb 3"]) -> Match:
        return next(self._match_pairs(iter([(image_A, image_B)]), stages=False))

    def _match_pairs(self, pairs: Iterator[ImagePair], stages: bool) -> Iterator[Match]:
        return (self._best(image_A, image_B, stages) for image_A, image_B in pairs)

    def _best(self, image_A: Tensor, image_B: Tensor, stages: bool) -> Match:
        def match(image_B: Tensor) -> Match:
            return next(self._matcher._match_pairs(iter([(image_A, image_B)]), stages))

        upright = match(image_B)
        if upright.overlap >= NO_OVERLAP:
            return upright
        turned = [turned_back(match(torch.rot90(image_B, turns).contiguous()), turns) for turns in _TURNS]
        best = max(turned, key=lambda found: found.overlap)
        return best if best.overlap >= NO_OVERLAP else upright  # of poor ones, what was asked for


def turned_back(match: Match, turns: int) -> Match:
    """The match of A and B, from that of A and B after ``turns`` quarter turns counter-clockwise (`torch.rot90`)."""
    height, width = match.hw_B
    hw_B = (width, height) if turns % 2 else (height, width)
    keypoints_B = match.keypoints_B
    if keypoints_B is not None:
        keypoints_B = to_pixel(_places(to_normalized(keypoints_B, match.hw_B), turns), hw_B)
    stages = tuple(_maps(stage, turns) for stage in match.stages)
    return replace(_maps(match, turns), hw_B=hw_B, keypoints_B=keypoints_B, stages=stages, turns_B=turns)


def _maps(result: _Result, turns: int) -> _Result:
    """Every map of a match or a stage for the image B that was not turned."""
    here = {field.name for field in fields(result)}
    turned = {
        name: turn(value, turns).contiguous()
        for name, turn in _TURN_BACK.items()
        if name in here and (value := getattr(result, name)) is not None
    }
    return replace(result, **turned)


def _places(in_B: Float[Tensor, "*n 2"], turns: int) -> Float[Tensor, "*n 2"]:
    """Normalised places in the turned B, or differences of such, in B; the centre stays where it is."""
    for _ in range(turns):
        in_B = torch.stack([-in_B[..., 1], in_B[..., 0]], dim=-1)
    return in_B


def _grid(over_B: Float[Tensor, "hb wb *c"], turns: int) -> Float[Tensor, "hb2 wb2 *c"]:
    return torch.rot90(over_B, -turns)


def _anchors(of_B: Float[Tensor, "ha wa gh gw"], turns: int) -> Float[Tensor, "ha wa gh2 gw2"]:
    return torch.rot90(of_B, -turns, dims=(2, 3))


# What of a result lies on B's grid, and what names places in B; the other maps do not know of B's orientation.
_TURN_BACK: dict[str, Callable[[Tensor, int], Tensor]] = {
    "warp_A_to_B": _places,
    "displacement": _places,
    "anchor_probs": _anchors,
    "warp_B_to_A": _grid,
    "certainty_B_to_A": _grid,
    "displacement_B_to_A": _grid,
    "anchor_probs_B_to_A": _grid,
}
