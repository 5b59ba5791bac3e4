"""The CPU backend: numba kernels behind one `torch.autograd.Function`."""

import math
import weakref
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2m_viz._simd import LANES
from l2m_viz.errors import L2MError
from l2m_viz.gaussians import _splat, _splat_grad, _splat_lift
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.gaussians.reference import Layers
from l2m_viz.geometry import HW, Camera
from l2m_viz.parallel import num_threads, run_kernel


def render(gaussians: Gaussians, camera: Camera, near: float, far: float, eps2d: float) -> Layers:
    """Draw one camera: colour, features, sum of weight times z, alpha; differentiable by every parameter."""
    if torch.is_grad_enabled() and (camera.w2c.requires_grad or camera.K.requires_grad):
        todo = "use backend='reference' for gradients by the camera"
        raise L2MError("rasterize: the cpu backend has gradients by the Gaussians only", todo=todo)
    view = _View.of(camera, near, far, eps2d)
    features = gaussians.features
    if features is None:
        features = gaussians.means.new_zeros(len(gaussians), 0)
    color, feature, depth, alpha = _Splat.apply(*_parameters(gaussians), features, view)  # pyright: ignore[reportGeneralTypeIssues]
    return color, None if gaussians.features is None else feature, depth, alpha


def accumulate(
    gaussians: Gaussians,
    camera: Camera,
    cells: Float[Tensor, "h w d"],
    known: Bool[Tensor, "h w"],
    sums: Float[Tensor, "n d"],
    weights: Float[Tensor, " n"],
    limits: tuple[float, float, float],
) -> None:
    """Add to each Gaussian's sums and weights, in place, what the pixels that it helped to make say.

    A pixel adds its feature times its weight, alpha times transmittance, and the weight. Its feature is read bilinearly
    from cells that tile the image; it counts if all of its cells are known. ``limits`` are near, far and eps2d.
    """
    view = _View.of(camera, *limits)
    listed = _list_tiles(list(map(_array, _parameters(gaussians))), view)
    channels = cells.shape[2]
    padded = np.zeros((*cells.shape[:2], -(-channels // LANES) * LANES), np.float32)
    padded[..., :channels] = _array(cells)
    shares = _Shares.deal(listed, len(gaussians))
    private, private_weights = shares.zeros(channels), shares.zeros(1)
    target, target_weights = sums.numpy(), weights.numpy()[:, None]
    run_kernel(
        _splat_lift.accumulate_tiles, listed.start, listed.indices, listed.screen, padded, known.numpy(), view.hw,
        listed.columns, shares.first, shares.rows, target, target_weights, private, private_weights,
    )  # fmt: skip
    run_kernel(_splat_grad.add_private, shares.rows, private, target)
    run_kernel(_splat_grad.add_private, shares.rows, private_weights, target_weights)


@dataclass(frozen=True)
class _View:
    """A camera as the kernels take it."""

    w2c: np.ndarray
    K: np.ndarray
    hw: HW
    limits: tuple[np.float32, np.float32, np.float32]

    @classmethod
    def of(cls, camera: Camera, near: float, far: float, eps2d: float) -> Self:
        return cls(
            _array(camera.w2c),
            _array(camera.K),
            camera.hw,
            (np.float32(near), np.float32(far), np.float32(eps2d)),
        )


@dataclass(frozen=True)
class _Listed:
    """Projected Gaussians, and for each tile the list of those that reach into it."""

    screen: np.ndarray
    tiles: np.ndarray
    start: np.ndarray
    indices: np.ndarray
    columns: int


def _list_tiles(parameters: list[np.ndarray], view: _View) -> _Listed:
    n, (height, width) = len(parameters[0]), view.hw
    screen, tiles = _empty_rows(n, _splat.NUM_COLUMNS), np.empty((n, 4), np.int16)
    run_kernel(_splat.project_gaussians, *parameters, view.w2c, view.K, view.hw, *view.limits, screen, tiles)
    columns, rows = -(-width // _splat.TILE), -(-height // _splat.TILE)
    start, indices = run_kernel(_splat.bin_into_tiles, tiles, columns, rows)
    return _Listed(screen, tiles, start, indices, columns)


@dataclass(frozen=True)
class _Shares:
    """Tiles dealt to the threads in blocks, and the Gaussians that several of these share (rows, -1 for the others)."""

    first: np.ndarray
    rows: np.ndarray
    num_shared: int

    @classmethod
    def deal(cls, listed: _Listed, n: int) -> Self:
        """One block a thread; fewer when huge Gaussians would make the private rows more than the Gaussians."""
        blocks = num_threads()
        while True:
            first = _splat_grad.split_tiles(listed.start, blocks)
            rows, num_shared = _splat_grad.private_rows(listed.tiles, listed.columns, first)
            if blocks == 1 or num_shared * blocks <= n:
                return cls(first, rows, num_shared)
            blocks //= 2

    def zeros(self, channels: int) -> np.ndarray:
        """Private rows of a number of channels."""
        return np.zeros((len(self.first) - 1, self.num_shared, channels), np.float32)


class _Splat(torch.autograd.Function):
    """Forward and backward pass of one camera."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ANN401 (torch's signature)
        *parameters, features = map(_array, inputs[:6])
        view: _View = inputs[6]
        hw, listed = view.hw, _list_tiles(parameters, view)
        color, feature = np.empty((*hw, 3), np.float32), _recycled((*hw, features.shape[1]))
        depth, transmittance = np.empty(hw, np.float32), np.empty(hw, np.float32)
        last = np.empty(hw, np.int32)
        run_kernel(
            _splat.composite_tiles, listed.start, listed.indices, listed.screen, features, listed.columns,
            num_threads(), color, feature, depth, transmittance, last,
        )  # fmt: skip
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*inputs[:6])
            ctx.view, ctx.listed, ctx.drawn = view, listed, (last, transmittance)
        alpha = torch.from_numpy(1 - transmittance)
        return torch.from_numpy(color), torch.from_numpy(feature), torch.from_numpy(depth), alpha

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 (torch's signature)
        *grad_outputs: Any,  # noqa: ANN401
    ) -> tuple[Tensor | None, ...]:
        means, quats, log_scales, _, _, features = map(_array, ctx.saved_tensors)
        view: _View = ctx.view
        listed: _Listed = ctx.listed
        n, width = features.shape
        shares = _Shares.deal(listed, n)
        grad, g_features = np.zeros((n, _splat_grad.NUM_GRADS), np.float32), np.zeros((n, width), np.float32)
        private, private_features = shares.zeros(_splat_grad.NUM_GRADS), shares.zeros(width)
        run_kernel(
            _splat_grad.composite_backward, listed.start, listed.indices, listed.screen, features, listed.columns,
            shares.first, shares.rows, *ctx.drawn, *map(_array, grad_outputs),
            grad, g_features, private, private_features,
        )  # fmt: skip
        run_kernel(_splat_grad.add_private, shares.rows, private, grad)
        run_kernel(_splat_grad.add_private, shares.rows, private_features, g_features)
        g_means, g_quats, g_log_scales = (np.empty((n, k), np.float32) for k in (3, 4, 3))
        g_logits = np.empty((n, 1), np.float32)
        run_kernel(
            _splat_grad.project_backward, means, quats, log_scales, view.w2c, view.K, view.hw, listed.tiles,
            listed.screen, grad, g_means, g_quats, g_log_scales, g_logits,
        )  # fmt: skip
        g_colors = np.ascontiguousarray(grad[:, _splat_grad.GRAD_RED :])
        grads = (g_means, g_quats, g_log_scales, g_logits[:, 0], g_colors, g_features)
        return *map(torch.from_numpy, grads), None


def _parameters(gaussians: Gaussians) -> tuple[Tensor, ...]:
    """What is projected, in the kernel's order."""
    g = gaussians
    return g.means, g.quats, g.log_scales, g.logit_opacities, g.colors


def _array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy(), np.float32)


def _recycled(shape: tuple[int, ...]) -> np.ndarray:
    """Memory for an image, if it can be that of the last one of this size that nobody holds any more.

    The C library returns blocks this large to the system, which zeroes every page of the next one: a quarter of the
    time that 32 channels of 512x512 px take to render. One block is kept, of 256 MB at most.
    """
    size = math.prod(shape)
    memory = _spare.pop(size, None)
    if memory is None:
        memory = np.empty(size, np.float32)
    image = memory.reshape(shape)
    if memory.nbytes <= _MAX_SPARE:
        weakref.finalize(image, _keep, memory).atexit = False
    return image


def _keep(memory: np.ndarray) -> None:
    _spare.clear()
    _spare[memory.size] = memory


_spare: dict[int, np.ndarray] = {}
_MAX_SPARE = 2**28


def _empty_rows(n: int, width: int) -> np.ndarray:
    """Memory for n rows that begin at cache lines, in large pages where the system has them (torch does not ask)."""
    line = 64 // np.dtype(np.float32).itemsize
    memory = np.empty(n * width + line, np.float32)
    first = -(memory.ctypes.data // memory.itemsize) % line
    return memory[first : first + n * width].reshape(n, width)
