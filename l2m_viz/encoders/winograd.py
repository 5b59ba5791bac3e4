"""3x3 convolutions with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016). A tile d of 6x6 input pixels and a
filter g of 3x3 taps give 4x4 outputs as A^T [(G g G^T) * (B^T d B)] A, where * is a product of single numbers; summed
over channels it is 36 matrix products. In float32 the results are within 1e-5 of the largest. For inference on a CPU.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz._simd import LANES
from l2m_viz.parallel import is_traced, large_empty, run_kernel

_G = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
# Transformed tiles and products at a time: what stays in the last cache, but no less than the filters, which each time
# are read again.
_LEAST_BYTES = 6 * 2**20
_LEAST_CHANNELS = 32  # with fewer the transforms cost more than the products save


def suits_winograd(x: Float[Tensor, "b c h w"], conv: nn.Conv2d) -> bool:
    """Whether `winograd_conv` can stand for this convolution of this map, and is quicker."""
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= _LEAST_CHANNELS
        and conv.in_channels % LANES == conv.out_channels % LANES == 0
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
    )


def transform_filters(weight: Float[Tensor, "d c 3 3"]) -> Float[Tensor, "36 c d"]:
    """G g G^T of all filters; channels are multiples of eight."""
    d, c = weight.shape[:2]
    filters = torch.kron(_G, _G) @ weight.permute(2, 3, 0, 1).reshape(9, d * c)
    return filters.view(-1, d, c).transpose(1, 2)


@torch.no_grad()
def winograd_conv(
    x: Float[Tensor, "b c h w"],
    filters: Float[Tensor, "36 c d"],
    bias: Float[Tensor, " d"],
    *,
    relu: bool = False,
) -> Float[Tensor, "b d h w"]:
    """Convolve with padding 1 by what `transform_filters` made; with ``relu`` nothing negative is left."""
    from l2m_viz.encoders._winograd import IN, OUT, transform_input, transform_output

    source = x.permute(0, 2, 3, 1).contiguous()
    b, h, w, c = source.shape
    d = len(bias)
    out = large_empty((b, h, w, d), source.dtype)
    tiles = b * -(-h // OUT) * -(-w // OUT)
    several = max(_LEAST_BYTES, 4 * filters.numel()) // (4 * IN * IN * (c + d)) | 1
    plane = _plane(several * c)
    transformed = large_empty((IN * IN * plane,), source.dtype)
    for first in range(0, tiles, several):
        count = min(several, tiles - first)
        run_kernel(transform_input, source.numpy(), first, count, plane, transformed.numpy())
        products = torch.bmm(transformed.as_strided((IN * IN, count, c), (plane, c, 1)), filters)
        run_kernel(
            transform_output,
            products.numpy().reshape(-1),
            first,
            count,
            count * d,
            bias.numpy(),
            relu,
            out.numpy(),
        )
    return out.permute(0, 3, 1, 2)


def _plane(size: int) -> int:
    """Floats from one of the 36 planes to the next: 36 places that are whole pages apart would share a cache's set."""
    line, page = 16, 1024
    return -(-size // page) * page + line
