"""A convolution and its batch norm as one convolution, when nothing is being learned."""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.encoders.winograd import suits_winograd, transform_filters, winograd_conv


def conv_norm(
    x: Float[Tensor, "b c h w"], conv: nn.Conv2d, norm: nn.BatchNorm2d, *, relu: bool = False
) -> Float[Tensor, "b d h2 w2"]:
    """Return ``norm(conv(x))``, with ``relu`` its positive part; in evaluation the map is written once."""
    if norm.training or torch.is_grad_enabled() or conv.padding_mode != "zeros":
        _kept.pop(conv, None)  # what learns has other filters next time, whatever its optimiser tells torch
        y = norm(conv(x))
        return F.relu(y, inplace=True) if relu else y
    if suits_winograd(x, conv):
        return winograd_conv(x, *_winograd_filters(conv, norm), relu=relu)
    weight, bias = fold(conv, norm)
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y.relu_() if relu else y


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Float[Tensor, "d c kh kw"], Float[Tensor, " d"]]:
    """Return weight and bias of the convolution that does what ``conv`` and ``norm`` do in evaluation.

    There the norm is a fixed scale and shift of each channel.
    """
    assert norm.running_mean is not None  # only a norm without statistics of its own has none
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    return conv.weight * scale[:, None, None, None], shift if conv.bias is None else conv.bias * scale + shift


def _winograd_filters(
    conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> tuple[Float[Tensor, "36 c d"], Float[Tensor, " d"]]:
    """Transformed filters and bias; small ones are kept with the convolution until a parameter changes."""
    if 36 * conv.in_channels * conv.out_channels > _MOST_KEPT:
        weight, bias = fold(conv, norm)
        return transform_filters(weight), bias
    # Sums tell a change that torch does not count, as one by `.data` or by a fused optimiser.
    parameters = [*conv.parameters(), *norm.parameters(), *norm.buffers()]
    state = [
        (id(p), 0 if p.is_inference() else p._version, p.sum(dtype=torch.float64).item()) for p in parameters
    ]
    if conv not in _kept or _kept[conv][0] != state:
        weight, bias = fold(conv, norm)
        _kept[conv] = state, (transform_filters(weight), bias)
    return _kept[conv][1]


_kept: WeakKeyDictionary[nn.Conv2d, tuple[list[tuple[int, int, float]], tuple[Tensor, Tensor]]] = (
    WeakKeyDictionary()
)
# Numbers of a layer's filters: to make them again takes a third of a small map's convolution, and nothing of a large
# one's, which has large filters, too.
_MOST_KEPT = 2**21
