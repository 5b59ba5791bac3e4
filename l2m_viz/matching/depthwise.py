"""5x5 depth-wise convolutions, quick on a CPU, and so are their gradients."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_viz.parallel import num_threads, run_kernel

KERNEL = 5


class DepthwiseConv2d(nn.Conv2d):
    """A depth-wise `nn.Conv2d` of stride 1 that keeps the size.

    On a CPU torch needs twice as long as our kernel for the map, and ten times as long as for the map for the gradient.
    That is a convolution itself with regard to the input, and with regard to the weights a sum that another kernel adds
    up; only 5x5, the size that RoMa's refiners use.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape."""
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if (
            not learns
            or input.device.type != "cpu"
            or self.kernel_size[0] != KERNEL
            or input.dtype == torch.float64
        ):
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return _Depthwise.apply(input, self.weight, self.bias)


def convolve(
    source: Float[Tensor, "b h w c"],
    first: int,
    weight: Float[Tensor, "c 1 5 5"],
    bias: Float[Tensor, " c"] | None,
    out: Float[Tensor, "b rows w c"],
    *,
    relu: bool = False,
) -> None:
    """Fill ``out`` with the convolution at rows ``first`` on of a float32 map on the CPU, which is zero outside."""
    from l2m_viz.matching._depthwise import convolve

    taps = weight.detach().reshape(len(weight), -1).T.contiguous().view(-1).numpy()
    shift = np.zeros(len(weight), np.float32) if bias is None else bias.detach().contiguous().numpy()
    flat_source, flat_out = source.view(-1).numpy(), out.view(-1).numpy()
    run_kernel(convolve, flat_source, tuple(source.shape), first, out.shape[1], taps, shift, relu, flat_out)


def _convolved(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "c 1 5 5"], bias: Float[Tensor, " c"] | None
) -> Float[Tensor, "b c h w"]:
    if x.dtype != torch.float32:
        return F.conv2d(x, weight, bias, padding=KERNEL // 2, groups=x.shape[1])
    source = x.permute(0, 2, 3, 1).contiguous()
    out = torch.empty_like(source)
    convolve(source, 0, weight, bias, out)
    return out.permute(0, 3, 1, 2)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else bias.to(x.dtype)
        return _convolved(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolved(grad, weight.flip(2, 3).to(grad.dtype), None)
        grad_bias = grad.sum(dim=(0, 2, 3), dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return grad_x, _weight_gradient(x, grad), grad_bias


def _weight_gradient(x: Float[Tensor, "b c h w"], grad: Float[Tensor, "b c h w"]) -> Float[Tensor, "c 1 5 5"]:
    from l2m_viz.matching._depthwise import weight_gradient

    _, channels, height, width = x.shape
    rim = KERNEL // 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, rim, rim, rim, rim)).float()
    shares = np.empty((num_threads(), KERNEL * KERNEL, channels), np.float32)
    flat = (array.contiguous().numpy().reshape(-1) for array in (padded, grad.permute(0, 2, 3, 1).float()))
    run_kernel(weight_gradient, *flat, height, width, shares)
    return torch.from_numpy(shares.sum(axis=0)).T.reshape(channels, 1, KERNEL, KERNEL)
