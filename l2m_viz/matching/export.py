"""A matching network as an ONNX file, for runtimes without torch."""

import io
import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.data.files import atomic_write
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import HW
from l2m_viz.matching.network import DenseNetwork

INPUTS = ("image_A", "image_B")
OUTPUTS = ("warp_A_to_B", "certainty_A_to_B", "warp_B_to_A", "certainty_B_to_A")
_OPSET = 17  # the first that reads whole layer norms


def export_onnx(network: DenseNetwork, path: str | Path, hw_A: HW, hw_B: HW) -> None:
    """Write one pass of a network for images of these sizes.

    The file takes images (1, 3, H, W), RGB in [0, 1], and gives what `Match` holds: warps (1, h, w, 2), absolute and
    normalised, and certainties (1, h, w), at the finest refiner's resolution. Sizes are fixed: positions are part of
    the graph.

    Raises:
        ShapeError: the coarse stride does not divide a side.
    """
    stride = network.cfg.coarse.stride
    for hw in (hw_A, hw_B):
        if any(side < stride or side % stride for side in hw):
            raise ShapeError(
                "export_onnx", expected=f"sides that {stride} divides", got=f"{hw[1]}x{hw[0]} px"
            )
    device = next(network.parameters()).device
    images = tuple(torch.zeros(1, 3, *hw, device=device) for hw in (hw_A, hw_B))
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes become constants is what is wanted
        torch.onnx.export(
            _OnePass(network).eval(), images, buffer,  # pyright: ignore[reportArgumentType]
            input_names=INPUTS, output_names=OUTPUTS,
            opset_version=_OPSET, dynamo=False,
        )  # fmt: skip
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


class _OnePass(nn.Module):
    """The last stage of both directions as plain tensors."""

    def __init__(self, network: DenseNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, image_A: Float[Tensor, "b 3 h w"], image_B: Float[Tensor, "b 3 h2 w2"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Warp and certainty, there and back."""
        there, back = (stages[-1] for stages in self.network(image_A, image_B))
        return *_finished(there.warp, there.certainty_logit), *_finished(back.warp, back.certainty_logit)


def _finished(warp: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
    """As `Match` has them: a target outside the other image is certain of nothing."""
    inside = (warp.abs() <= 1).all(dim=1)
    return warp.clamp(-1, 1).permute(0, 2, 3, 1), logit[:, 0].sigmoid() * inside
