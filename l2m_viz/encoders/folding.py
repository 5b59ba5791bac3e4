"""A convolution and its batch norm as one convolution, when nothing is being learned."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def conv_norm(
    x: Float[Tensor, "b c h w"], conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> Float[Tensor, "b d h2 w2"]:
    """Return ``norm(conv(x))``; in evaluation the map is written once instead of twice."""
    if norm.training or torch.is_grad_enabled():
        return norm(conv(x))
    weight, bias = fold(conv, norm)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Float[Tensor, "d c kh kw"], Float[Tensor, " d"]]:
    """Return weight and bias of the convolution that does what ``conv`` and ``norm`` do in evaluation.

    There the norm is a fixed scale and shift of each channel.
    """
    assert norm.running_mean is not None  # only a norm without statistics of its own has none
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    return conv.weight * scale[:, None, None, None], shift if conv.bias is None else conv.bias * scale + shift
