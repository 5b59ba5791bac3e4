"""Local correlation: how alike a pixel of A is to each pixel in a window around its present target in B.

The dot product with an interpolated feature is the interpolated dot product. So the window's dot products are taken at
whole pixels and interpolated afterwards: the same numbers as from sampling hundreds of channels at every place of every
window, for a fraction of the bytes. Two forms of the same sum: a numba kernel for the CPU, and for other devices,
float64 and export torch operations that gather each cell's window and multiply it with the cell's vector.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from l2m_viz.constants import constant
from l2m_viz.geometry import to_integer_centers, to_pixel
from l2m_viz.parallel import is_traced, run_kernel


def local_correlation(
    features_A: Float[Tensor, "b c h w"],
    features_B: Float[Tensor, "b c h2 w2"],
    warp: Float[Tensor, "b 2 h w"],
    radius: int,
) -> Float[Tensor, "b k h w"]:
    """Return the dot products, divided by sqrt(c), in a window of (2r+1)^2 pixels of B around each pixel's target.

    Windows are row by row, dy then dx; B is zero outside its borders. Gradients go to ``features_A`` only: neither the
    positions nor the sampled features have any, as in RoMa. The result is float32 (float64 if the features are).
    """
    dtype = torch.promote_types(features_A.dtype, torch.float32)
    with torch.autocast(features_A.device.type, enabled=False):  # which takes products to half precision
        features_A, features_B = features_A.to(dtype), features_B.detach().to(dtype)
        h, w = features_B.shape[-2:]
        targets = to_integer_centers(
            to_pixel(warp.detach().permute(0, 2, 3, 1).to(dtype), (h, w))
        )  # [b h w 2]
        if is_traced():
            correlation = _correlate_in_torch(features_A, features_B, targets, radius)
        elif features_A.device.type == "cpu" and dtype == torch.float32:
            correlation = _Correlate.apply(features_A, features_B, targets, radius)
        else:
            correlation = _CorrelateInTorch.apply(features_A, features_B, targets, radius)
    return correlation.permute(0, 3, 1, 2)  # channels last in memory, as the convolutions after it like it


class _Correlate(torch.autograd.Function):
    """The kernels of `_correlate` on torch tensors."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch has no public type for it)
        features_A: Tensor,
        features_B: Tensor,
        targets: Tensor,
        radius: int,
    ) -> Tensor:
        from l2m_viz.matching import _correlate

        b, _, h, w = features_A.shape
        features_B = _channels_last(features_B)
        ctx.save_for_backward(features_B, targets)
        ctx.radius = radius
        out = features_A.new_empty(b, h, w, (2 * radius + 1) ** 2)
        arrays = (_channels_last(features_A), features_B, targets.contiguous())
        run_kernel(_correlate.correlate, *(array.detach().numpy() for array in arrays), radius, out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        from l2m_viz.matching import _correlate

        features_B, targets = ctx.saved_tensors
        grad_A = torch.empty(*targets.shape[:3], features_B.shape[-1])
        arrays = (grads[0].contiguous(), features_B, targets.contiguous())
        run_kernel(
            _correlate.correlate_backward, *(array.numpy() for array in arrays), ctx.radius, grad_A.numpy()
        )
        return grad_A.permute(0, 3, 1, 2), None, None, None


class _CorrelateInTorch(torch.autograd.Function):
    """`_correlate_in_torch`, whose windows are gathered again for the gradient: kept, they would be gigabytes."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch has no public type for it)
        features_A: Tensor,
        features_B: Tensor,
        targets: Tensor,
        radius: int,
    ) -> Tensor:
        ctx.save_for_backward(features_B, targets)
        ctx.radius = radius
        return _correlate_in_torch(features_A, features_B, targets, radius)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        features_B, targets = ctx.saved_tensors
        windows, channels = _Windows(features_B, targets, ctx.radius), features_B.shape[1]
        grad = grads[0].reshape(windows.num, windows.side - 1, windows.side - 1)
        grad_A = grad.new_empty(windows.num, channels)
        with torch.autocast(grad.device.type, enabled=False):
            for cells in windows.blocks():
                spread = _spread(grad[cells], windows.fractions[cells])
                grad_A[cells] = torch.bmm(spread.flatten(1)[:, None], windows.gather(cells))[:, 0]
        grad_A = grad_A.view(*targets.shape[:3], channels) / channels**0.5
        return grad_A.permute(0, 3, 1, 2), None, None, None


def _correlate_in_torch(
    features_A: Float[Tensor, "b c h w"],
    features_B: Float[Tensor, "b c h2 w2"],
    targets: Float[Tensor, "b h w 2"],
    radius: int,
) -> Float[Tensor, "b h w k"]:
    windows, channels = _Windows(features_B, targets, radius), features_A.shape[1]
    a = features_A.permute(0, 2, 3, 1).reshape(windows.num, channels, 1) / channels**0.5
    if is_traced():  # all cells at once, a row of their windows at a time: whole windows would be gigabytes
        everything = slice(0, windows.num)
        rows = [
            torch.bmm(windows.gather(everything, slice(v, v + 1)), a)[..., 0] for v in range(windows.side)
        ]
        correlation = _interpolated(torch.stack(rows, dim=1), windows.fractions)
    else:
        correlation = a.new_empty(windows.num, (windows.side - 1) ** 2)
        for cells in windows.blocks():
            dots = torch.bmm(windows.gather(cells), a[cells]).view(-1, windows.side, windows.side)
            correlation[cells] = _interpolated(dots, windows.fractions[cells])
    return correlation.view(*targets.shape[:3], (windows.side - 1) ** 2)


class _Windows:
    """The windows of whole pixels of B around the targets of all cells, (2r + 2)^2 each; zeros outside of B.

    Attributes:
        num: How many.
        side: 2r + 2.
        fractions: Where the targets lie between the pixels (x, y), (n, 2).
    """

    def __init__(
        self, features_B: Float[Tensor, "b c h w"], targets: Float[Tensor, "b h2 w2 2"], radius: int
    ) -> None:
        batch, channels, height, width = features_B.shape
        self._hw, self._radius = (height, width), radius
        self.side, self.num = 2 * radius + 2, targets.shape[:3].numel()
        corner = targets.floor()
        self.fractions = (targets - corner).nan_to_num().reshape(self.num, 2)
        # The window of a target this far outside is all zeros; clamped, its indices stay small. NaN is outside, too.
        limit = constant((width + radius, height + radius), targets.device, targets.dtype)
        corner = torch.minimum(corner.nan_to_num(nan=-torch.inf).clamp(min=-radius - 2), limit)
        self._corner = corner.long().reshape(self.num, 2)
        b = F.pad(features_B.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # a frame of zeros
        self._rows = b.reshape(batch * (height + 2) * (width + 2), channels)
        of_image = torch.arange(batch, device=b.device) * ((height + 2) * (width + 2))
        self._start = of_image.repeat_interleave(self.num // max(1, batch))

    def blocks(self) -> list[slice]:
        """Cells whose windows fit into memory together."""
        bytes_of_one = self.side**2 * max(1, self._rows.shape[1]) * self._rows.element_size()
        step = max(1, min(_MAX_CELLS, _BLOCK_BYTES // bytes_of_one))
        return [slice(first, first + step) for first in range(0, self.num, step)]

    def gather(self, cells: slice, rows: slice = slice(None)) -> Float[Tensor, "n k c"]:
        """The windows of some cells, or some rows of them, row by row."""
        (height, width), r = self._hw, self._radius
        steps = torch.arange(-r, r + 2, device=self._rows.device)
        column = (self._corner[cells, :1] + steps).clamp(-1, width) + 1
        row = (self._corner[cells, 1:] + steps[rows]).clamp(-1, height) + 1
        index = self._start[cells, None, None] + row[:, :, None] * (width + 2) + column[:, None]
        return self._rows[index.flatten(1)]


_BLOCK_BYTES = 512 * 2**20
_MAX_CELLS = 32_768  # a batched product's grid has a limit


def _interpolated(dots: Float[Tensor, "n k k"], fractions: Float[Tensor, "n 2"]) -> Float[Tensor, "n m"]:
    """The products at whole pixels, bilinearly between them: (2r + 2)^2 become (2r + 1)^2."""
    x, y = fractions[:, None, None].unbind(dim=-1)  # [n 1 1]
    rows = torch.lerp(dots[:, :, :-1], dots[:, :, 1:], x)
    return torch.lerp(rows[:, :-1], rows[:, 1:], y).flatten(1)


def _spread(grad: Float[Tensor, "n m m"], fractions: Float[Tensor, "n 2"]) -> Float[Tensor, "n k k"]:
    """The adjoint of `_interpolated`."""
    x, y = fractions[:, None, None].unbind(dim=-1)
    rows = F.pad(grad * (1 - y), (0, 0, 0, 1)) + F.pad(grad * y, (0, 0, 1, 0))
    return F.pad(rows * (1 - x), (0, 1)) + F.pad(rows * x, (1, 0))


def _channels_last(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).contiguous()
