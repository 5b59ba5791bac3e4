"""The CPU backend: numba kernels behind one `torch.autograd.Function`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2m_viz.errors import L2MError
from l2m_viz.gaussians import _splat, _splat_grad
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.gaussians.reference import Layers
from l2m_viz.geometry import HW, Camera
from l2m_viz.parallel import num_threads, run_kernel


def render(gaussians: Gaussians, camera: Camera, near: float, far: float, eps2d: float) -> Layers:
    """Draw one camera: colour, features, sum of weight times z, alpha; differentiable by every parameter."""
    if torch.is_grad_enabled() and (camera.w2c.requires_grad or camera.K.requires_grad):
        todo = "use backend='reference' for gradients by the camera"
        raise L2MError("rasterize: the cpu backend has gradients by the Gaussians only", todo=todo)
    view = _View(_array(camera.w2c), _array(camera.K), camera.hw, near, far, eps2d)
    features = gaussians.features
    if features is None:
        features = gaussians.means.new_zeros(len(gaussians), 0)
    parameters = (
        gaussians.means,
        gaussians.quats,
        gaussians.log_scales,
        gaussians.logit_opacities,
        gaussians.colors,
    )
    color, feature, depth, alpha = _Splat.apply(*parameters, features, view)  # pyright: ignore[reportGeneralTypeIssues]
    return color, None if gaussians.features is None else feature, depth, alpha


@dataclass(frozen=True)
class _View:
    w2c: np.ndarray
    K: np.ndarray
    hw: HW
    near: float
    far: float
    eps2d: float


class _Splat(torch.autograd.Function):
    """Forward and backward pass of one camera."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ANN401 (torch's signature)
        means, quats, log_scales, logits, colors, features = map(_array, inputs[:6])
        view: _View = inputs[6]
        n, hw = len(means), view.hw
        screen, tiles = _empty_rows(n, _splat.NUM_COLUMNS), np.empty((n, 4), np.int16)
        limits = map(np.float32, (view.near, view.far, view.eps2d))
        run_kernel(
            _splat.project_gaussians, means, quats, log_scales, logits, colors, view.w2c, view.K, hw, *limits,
            screen, tiles,
        )  # fmt: skip
        columns, rows = -(-hw[1] // _splat.TILE), -(-hw[0] // _splat.TILE)
        start, indices = run_kernel(_splat.bin_into_tiles, tiles, columns, rows)
        color, feature = np.empty((*hw, 3), np.float32), np.empty((*hw, features.shape[1]), np.float32)
        depth, transmittance, last = (
            np.empty(hw, np.float32),
            np.empty(hw, np.float32),
            np.empty(hw, np.int32),
        )
        run_kernel(
            _splat.composite_tiles, start, indices, screen, features, columns,
            color, feature, depth, transmittance, last,
        )  # fmt: skip
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*inputs[:6])
            ctx.view, ctx.columns = view, columns
            ctx.buffers = (screen, tiles, start, indices, last, transmittance)
        alpha = torch.from_numpy(1 - transmittance)
        return torch.from_numpy(color), torch.from_numpy(feature), torch.from_numpy(depth), alpha

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 (torch's signature)
        *grad_outputs: Any,  # noqa: ANN401
    ) -> tuple[Tensor | None, ...]:
        means, quats, log_scales, _, _, features = map(_array, ctx.saved_tensors)
        screen, tiles, start, indices, last, transmittance = ctx.buffers
        view: _View = ctx.view
        n, width = features.shape
        first = _splat_grad.split_tiles(start, num_threads())
        rows, num_private = _splat_grad.private_rows(start, indices, first, n)
        grad, g_features = np.zeros((n, _splat_grad.NUM_GRADS), np.float32), np.zeros((n, width), np.float32)
        private = np.zeros((len(first) - 1, num_private, _splat_grad.NUM_GRADS), np.float32)
        private_features = np.zeros((len(first) - 1, num_private, width), np.float32)
        run_kernel(
            _splat_grad.composite_backward, start, indices, screen, features, ctx.columns, first, rows, last,
            transmittance, *map(_array, grad_outputs), grad, g_features, private, private_features,
        )  # fmt: skip
        run_kernel(_splat_grad.add_private, rows, private, grad)
        run_kernel(_splat_grad.add_private, rows, private_features, g_features)
        g_means, g_quats, g_log_scales = (np.empty((n, k), np.float32) for k in (3, 4, 3))
        g_logits = np.empty((n, 1), np.float32)
        run_kernel(
            _splat_grad.project_backward, means, quats, log_scales, view.w2c, view.K, view.hw, tiles, screen, grad,
            g_means, g_quats, g_log_scales, g_logits,
        )  # fmt: skip
        g_colors = np.ascontiguousarray(grad[:, _splat_grad.GRAD_RED :])
        return (
            *map(torch.from_numpy, (g_means, g_quats, g_log_scales, g_logits[:, 0], g_colors, g_features)),
            None,
        )


def _array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy(), np.float32)


def _empty_rows(n: int, width: int) -> np.ndarray:
    """Memory for n rows that begin at cache lines, in large pages where the system has them (torch does not ask)."""
    line = 64 // np.dtype(np.float32).itemsize
    memory = np.empty(n * width + line, np.float32)
    first = -(memory.ctypes.data // memory.itemsize) % line
    return memory[first : first + n * width].reshape(n, width)
