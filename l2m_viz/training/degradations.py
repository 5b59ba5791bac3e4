"""What lens, sensor and file do to a picture, pixel positions kept: blur, noise, resampling, JPEG, vignetting.

Everything works on planes (C, H, W) of values in [0, 1], three of colour or one of grey, wherever they are. Kernels are
centred and symmetric and resampling keeps the image spanning [0, W] x [0, H], so nothing moves.

kornia has most of this, but takes long on a CPU: for a 256x256 image, on two cores, 14 ms for JPEG, 5 ms for motion
blur and 8 ms for colour; here it is 3, 3 and 0.3 ms on one. The tests compare with kornia, scipy and libjpeg.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from l2m_viz.geometry import normalized_grid

# JFIF (ITU-R BT.601): Y = LUMA . rgb, Cb = (B - Y) / 1.772, Cr = (R - Y) / 1.402; chroma is 0 for grey.
LUMA = np.array([0.299, 0.587, 0.114])
YCC_FROM_RGB = np.stack([LUMA, ([0, 0, 1] - LUMA) / 1.772, ([1, 0, 0] - LUMA) / 1.402])
RGB_FROM_YCC = np.linalg.inv(YCC_FROM_RGB)

# Quantisation steps at quality 50 by vertical and horizontal frequency (ITU-T T.81, annex K), for values of 0 to 255.
_LUMA_STEPS = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMA_STEPS = np.full((8, 8), 99)
_CHROMA_STEPS[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_BLOCK = 8
_DCT = (
    np.cos(np.pi / 16 * np.outer(np.arange(8), 2 * np.arange(8) + 1)) / 2
)  # orthonormal: row k is frequency k
_DCT[0] /= math.sqrt(2)
_DCT_OF_PAIRS = np.repeat(_DCT, 2, axis=1) / 2  # of the means of pairs


def as_tensor(values: np.ndarray, like: Tensor) -> Tensor:
    """Put numbers where ``like`` is, in its type."""
    return torch.from_numpy(values).to(like)


def correlate(planes: Float[Tensor, "c h w"], kernel: Float64[np.ndarray, "m n"]) -> Float[Tensor, "c h w"]:
    """Weigh each pixel's neighbours, borders repeated; ``kernel`` has odd sides, its middle is the pixel itself.

    A shifted sum for each weight that is not 0: for the few that blurs have, faster on the CPU than a convolution.
    """
    height, width = planes.shape[1:]
    bottom, right = (side // 2 for side in kernel.shape)
    padded = F.pad(planes[None], (right, right, bottom, bottom), mode="replicate")[0]
    out = torch.zeros_like(planes)
    for y, x in np.argwhere(kernel):
        out.add_(padded[:, y : y + height, x : x + width], alpha=float(kernel[y, x]))
    return out


def gaussian_blur(planes: Float[Tensor, "c h w"], sigma: float) -> Float[Tensor, "c h w"]:
    """Blur with a standard deviation in pixels."""
    radius = max(1, math.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)[None]
    weights /= weights.sum()
    return correlate(correlate(planes, weights), weights.T)


def motion_blur(planes: Float[Tensor, "c h w"], length: float, angle_deg: float) -> Float[Tensor, "c h w"]:
    """Average over a line of ``length`` pixels through each pixel; 0 degrees is along x, 90 along y."""
    return correlate(planes, motion_kernel(length, angle_deg))


def motion_kernel(length: float, angle_deg: float) -> Float64[np.ndarray, "n n"]:
    """Weights of a line through the middle, spread bilinearly over the pixels beside it."""
    radius = math.ceil(length / 2)
    num = 2 * math.ceil(length) + 1  # two samples a pixel, the same on both sides of the middle
    along = np.linspace(-0.5, 0.5, num) * max(0.0, length - 1)
    offsets = np.arange(-radius, radius + 1)
    angle = math.radians(angle_deg)
    near_x, near_y = (
        np.clip(1 - np.abs(offsets - along[:, None] * share), 0, None)
        for share in (math.cos(angle), math.sin(angle))
    )  # [num side]
    kernel = near_y.T @ near_x / num
    return np.where(kernel > 1e-6, kernel, 0.0)


def vignette(planes: Float[Tensor, "c h w"], strength: float) -> Float[Tensor, "c h w"]:
    """Darken towards the corners, which lose the share ``strength``, as the square of the distance."""
    height, width = planes.shape[1:]
    x = normalized_grid((1, width), device=planes.device, dtype=planes.dtype)[..., 0]  # [1 w]
    y = normalized_grid((height, 1), device=planes.device, dtype=planes.dtype)[..., 1]  # [h 1]
    return planes * (1 - strength / 2 * (x**2 + y**2))


def add_noise(
    planes: Float[Tensor, "c h w"], read_noise: float, shot_noise: float, generator: torch.Generator
) -> Float[Tensor, "c h w"]:
    """Add normal noise of variance read_noise^2 + shot_noise value; the generator is of the planes' device."""
    noise = torch.randn(planes.shape, generator=generator, device=planes.device, dtype=planes.dtype)
    if shot_noise == 0:
        return noise.mul_(read_noise).add_(planes)
    return noise.mul_(planes.mul(shot_noise).add_(read_noise**2).sqrt_()).add_(planes)


def resample(planes: Float[Tensor, "c h w"], scale: float) -> Float[Tensor, "c h w"]:
    """Shrink to the share ``scale`` of both sides and enlarge again."""
    height, width = planes.shape[1:]
    small_hw = max(1, round(height * scale)), max(1, round(width * scale))
    small = F.interpolate(planes[None], small_hw, mode="bilinear", align_corners=False, antialias=True)
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0]


def compress(planes: Float[Tensor, "c h w"], quality: int) -> Float[Tensor, "c h w"]:
    """Lose what a JPEG of this quality (1 to 100, as libjpeg counts) loses; three planes are RGB, chroma is halved.

    No bits are coded, since that loses nothing, and nothing is rounded to 8 bits.
    """
    colored, height, width = len(planes) == 3, *planes.shape[1:]
    unit = 2 * _BLOCK if colored else _BLOCK
    bottom, right = -height % unit, -width % unit
    padded = F.pad(planes[None], (0, right, 0, bottom), mode="replicate")[0] if bottom or right else planes
    if not colored:
        return _quantized(padded - 0.5, _DCT, _LUMA_STEPS, quality).add_(0.5)[:, :height, :width]
    ycc = (as_tensor(YCC_FROM_RGB, planes) @ padded.flatten(1)).view(padded.shape)
    luma = _quantized(ycc[:1] - 0.5, _DCT, _LUMA_STEPS, quality).add_(0.5)
    chroma = _quantized(ycc[1:], _DCT_OF_PAIRS, _CHROMA_STEPS, quality)
    # The luma is added to each channel as it is.
    rgb = torch.addmm(luma.flatten(1), as_tensor(RGB_FROM_YCC[:, 1:], planes), chroma.flatten(1))
    return rgb.view(padded.shape)[:, :height, :width]


def _quantized(
    planes: Float[Tensor, "c h w"], transform: Float64[np.ndarray, "8 n"], steps: np.ndarray, quality: int
) -> Float[Tensor, "c h w"]:
    """Round the transform of each block of n x n pixels to multiples of the steps; sides are whole blocks."""
    side, width = transform.shape[1], planes.shape[2]
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = as_tensor(np.clip((steps * percent + 50) // 100, 1, 255) / 255, planes)
    table = table.repeat(1, width // side)  # [8 w/n*8], every block's row beside its neighbour's
    forward = as_tensor(transform, planes)
    back = forward * (
        side // _BLOCK
    )  # its transpose is the inverse, or gives both pixels of a pair their mean
    coefficients = (forward @ planes.reshape(-1, side, width)).view(-1, side) @ forward.T  # [c h/n 8 w/n, 8]
    coefficients = coefficients.view(-1, _BLOCK, table.shape[1])
    coefficients.div_(table).round_().mul_(table)
    columns = (back.T @ coefficients).view(-1, _BLOCK) @ back  # [c h w/n, n]
    return columns.view(planes.shape)
