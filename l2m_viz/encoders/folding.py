"""A convolution and its batch norm as one convolution, when nothing is being learned."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.encoders.winograd import suits_winograd, transform_filters, winograd_conv


def conv_norm(
    x: Float[Tensor, "b c h w"], conv: nn.Conv2d, norm: nn.BatchNorm2d, *, relu: bool = False
) -> Float[Tensor, "b d h2 w2"]:
    """Return ``norm(conv(x))``, with ``relu`` its positive part; in evaluation the map is written once."""
    if norm.training or torch.is_grad_enabled():
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
    parameters = [*conv.parameters(), *norm.parameters(), *norm.buffers()]
    keep = 36 * conv.in_channels * conv.out_channels <= _KEPT and not any(
        p.is_inference() for p in parameters
    )
    state = [(p.data_ptr(), p._version) for p in parameters] if keep else None
    kept = conv.__dict__.get("_kept_filters")
    if state is not None and kept is not None and kept[0] == state:
        return kept[1]
    weight, bias = fold(conv, norm)
    made = transform_filters(weight), bias
    if state is not None:
        conv.__dict__["_kept_filters"] = state, made
    return made


# Numbers of a layer's filters: to make them again takes a third of a small map's convolution, and nothing of a large
# one's, which has large filters, too.
_KEPT = 2**21
