"""What each stage of a matching network predicts; channels first, inside `nn.Module`s only."""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from l2m_viz.geometry import HW


@dataclass(frozen=True)
class StageOutput:
    """One direction of one stage.

    Attributes:
        stride: Pixels of the network's input to a cell.
        warp: Absolute normalised (x, y) in the other image of every cell.
        certainty_logit: Logit of being covisible, summed over the stages so far (RoMa).
        displacement: What propagation and refiner added to the warp, normalised; None at the coarse stage.
        anchor_logits: Scores of the other image's anchors at the coarse stage, row by row, else None.
        anchor_hw: Rows and columns of the anchors.
    """

    stride: int
    warp: Float[Tensor, "b 2 h w"]
    certainty_logit: Float[Tensor, "b 1 h w"]
    displacement: Float[Tensor, "b 2 h w"] | None = None
    anchor_logits: Float[Tensor, "b a h w"] | None = None
    anchor_hw: HW | None = None

    def first(self, num: int) -> "StageOutput":
        """The same for the first pairs of the batch only."""
        maps = {
            name: None if (value := getattr(self, name)) is None else value[:num]
            for name in ("warp", "certainty_logit", "displacement", "anchor_logits")
        }
        return replace(self, **maps)
