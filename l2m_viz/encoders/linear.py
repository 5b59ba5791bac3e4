"""Linear layers for inference on a CPU: oneDNN's product, which adds the bias and applies the GELU while it is at it.

torch's own float32 layer goes to MKL, copies the bias into all rows first and passes over them again for the GELU. On
the machines that this was measured on oneDNN's product alone is 8 to 20 % faster (AMD, Zen 4).
"""

import platform

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_viz.parallel import is_traced

# The operators that torch's own compiler uses for linear layers; other builds may lack them.
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and platform.machine().lower() in ("x86_64", "amd64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


def linear(layer: nn.Linear, x: Float[Tensor, "*b c"], *, gelu: bool = False) -> Float[Tensor, "*b d"]:
    """Return ``layer(x)``, with ``gelu`` x Phi(x) of it (to 1e-6)."""
    if (
        torch.is_grad_enabled()
        or x.device.type != "cpu"
        or not x.dtype == layer.weight.dtype == torch.float32
        or torch.is_autocast_enabled("cpu")
        or is_traced()
    ):
        y = layer(x)
        return F.gelu(y) if gelu else y
    y = affine(x.reshape(-1, layer.in_features), layer.weight, layer.bias, gelu=gelu)
    return y.view(*x.shape[:-1], layer.out_features)


def affine(
    x: Float[Tensor, "n c"],
    weight: Float[Tensor, "d c"],
    bias: Float[Tensor, " d"] | None,
    *,
    gelu: bool = False,
) -> Float[Tensor, "n d"]:
    """Return x weight^T + bias, with ``gelu`` x Phi(x) of it; float32 on the CPU, without gradients.

    Args:
        x: Rows.
        weight: As `nn.Linear` has it, or what `packed` made of it.
        bias: As `nn.Linear` has it.
        gelu: Whether GELU follows.
    """
    if not len(x):
        return x.new_empty(0, len(weight))
    if not _HAS_ONEDNN:
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    how = (
        ("gelu", [], "none") if gelu else ("none", [], "")
    )  # "none" is the exact GELU, "" no algorithm at all
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *how)


def packed(weight: Float[Tensor, "d c"], rows: int) -> Tensor:
    """The weight in the order that `affine` reads it in: for one that meets many blocks of so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows) if _HAS_ONEDNN else weight
