"""Linear layers for inference on a CPU: a matrix product, and bias and GELU in one more pass over its result.

torch first copies the bias into all rows and passes over them again for the GELU, which together takes a third as long
as the product.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_viz._simd import LANES
from l2m_viz.parallel import is_traced, large_empty, run_kernel


def linear(layer: nn.Linear, x: Float[Tensor, "*b c"], *, gelu: bool = False) -> Float[Tensor, "*b d"]:
    """Return ``layer(x)``, with ``gelu`` x Phi(x) of it (to 1e-6)."""
    if (
        torch.is_grad_enabled()
        or layer.bias is None
        or x.device.type != "cpu"
        or not x.dtype == layer.weight.dtype == torch.float32
        or layer.out_features % LANES
        or torch.is_autocast_enabled("cpu")
        or is_traced()
    ):
        y = layer(x)
        return F.gelu(y) if gelu else y
    y = large_empty((x.numel() // layer.in_features, layer.out_features), x.dtype)
    torch.mm(x.reshape(-1, layer.in_features), layer.weight.T, out=y)
    add_to_rows(y, layer.bias, gelu=gelu)
    return y.view(*x.shape[:-1], layer.out_features)


def add_to_rows(values: Float[Tensor, "n c"], row: Float[Tensor, " c"], *, gelu: bool = False) -> None:
    """Add a row to all rows, in place; float32 on the CPU, a multiple of eight columns."""
    from l2m_viz.encoders._linear import add_to_rows

    run_kernel(add_to_rows, values.numpy(), row.detach().contiguous().numpy(), gelu)
