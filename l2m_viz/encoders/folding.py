"""A convolution and its batch norm as one convolution, when nothing is being learned."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def conv_norm(
    x: Float[Tensor, "b c h w"], conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> Float[Tensor, "b d h2 w2"]:
    """Return ``norm(conv(x))``.

    In evaluation the norm is a fixed scale and shift of each channel: they go into the weights, which are few, and the
    map is written once instead of twice.
    """
    if norm.training or torch.is_grad_enabled():
        return norm(conv(x))
    scale, shift = batch_norm_scale_shift(norm)
    weight = conv.weight * scale[:, None, None, None]
    bias = shift if conv.bias is None else conv.bias * scale + shift
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def batch_norm_scale_shift(norm: nn.BatchNorm2d) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """What a batch norm in evaluation multiplies each channel by, and then adds."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics has no fixed scale")
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale
