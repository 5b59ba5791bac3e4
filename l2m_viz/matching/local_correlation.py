"""Local correlation: how alike a pixel of A is to each pixel in a window around its present target in B.

The dot product with an interpolated feature is the interpolated dot product. So the window's dot products are taken at
whole pixels and interpolated afterwards: the same numbers as from sampling hundreds of channels at every place of every
window, for a fraction of the bytes. Two forms of the same sum: a numba kernel for the CPU, and torch operations for
other devices, float64 and export.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

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
    features_A, features_B = features_A.to(dtype), features_B.detach().to(dtype)
    h, w = features_B.shape[-2:]
    targets = to_integer_centers(to_pixel(warp.detach().permute(0, 2, 3, 1).to(dtype), (h, w)))  # [b h w 2]
    if features_A.device.type == "cpu" and dtype == torch.float32 and not is_traced():
        correlation = _Correlate.apply(features_A, features_B, targets, radius)
    else:
        correlation = _correlate_in_torch(features_A, features_B, targets, radius)
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


def _correlate_in_torch(
    features_A: Float[Tensor, "b c h w"],
    features_B: Float[Tensor, "b c h2 w2"],
    targets: Float[Tensor, "b h w 2"],
    radius: int,
) -> Float[Tensor, "b h w k"]:
    height, width = features_B.shape[-2:]
    corner = targets.floor()
    x, y = (targets - corner)[..., None].unbind(dim=-2)  # fractions, [b h w 1]
    # The window around a target this far outside is all zeros; clamped, its indices stay small. NaN is outside, too.
    limit = torch.tensor([width, height], device=targets.device, dtype=targets.dtype) + radius
    corner = torch.minimum(corner.nan_to_num(nan=-torch.inf).clamp(min=-radius - 2), limit).long()
    a = features_A.permute(0, 2, 3, 1) / features_A.shape[1] ** 0.5  # [b h w c]
    b = F.pad(features_B.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # a frame of zeros; [b h2+2 w2+2 c]
    batch = torch.arange(len(b), device=b.device)[:, None, None]
    rows = []
    for v in range(-radius, radius + 2):
        row = (corner[..., 1] + v).clamp(-1, height) + 1
        columns = [(corner[..., 0] + u).clamp(-1, width) + 1 for u in range(-radius, radius + 2)]
        dots = [(a * b[batch, row, column]).sum(dim=-1) for column in columns]
        row_of_dots = torch.stack(dots, dim=-1)  # [b h w 2r+2]
        rows.append(torch.lerp(row_of_dots[..., :-1], row_of_dots[..., 1:], x.nan_to_num()))
    upper, lower = torch.stack(rows[:-1], dim=-2), torch.stack(rows[1:], dim=-2)  # [b h w 2r+1 2r+1]
    return torch.lerp(upper, lower, y.nan_to_num()[..., None]).flatten(-2)


def _channels_last(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).contiguous()
