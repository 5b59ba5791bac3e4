"""Depth Anything V2 (Yang et al., 2024) through transformers: disparity of one photo, up to scale and shift.

Photos are prepared by hand as the authors' `infer_image` does (short side 518 px, bicubic, sides multiples of the
14 px patches, ImageNet's mean and deviation); the image processor of transformers wants torchvision and fits the
side that changes less, which runs small photos at less than the size the network was trained for.

The numbers that come out grow towards the camera, have no unit, and are 0 far away. `disparity_scale` says how they
become inverse depth.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from l2m_viz.data.images import require_image
from l2m_viz.errors import FileFormatError, MissingError
from l2m_viz.lifting.networks import (
    INSTALL,
    NetworkFiles,
    load_complete,
    load_once,
    network_device,
    network_hw,
)

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation

VARIANTS = ("small", "base", "large")  # 24.8, 97.5 and 335.3 million parameters; only small is Apache-2.0
SHORT_SIDE = 518  # px
PATCH = 14  # px, the side of what DINOv2 sees as one token
FAR_RATIO = 100.0  # the farthest surface of a photo is so many times as far as its nearest

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_NEAR_PERCENTILE = 99.9  # of disparity: a few wild pixels do not decide what is near


def network_files(variant: str) -> NetworkFiles:
    """Where the weights of a variant come from."""
    name = f"Depth-Anything-V2-{variant.capitalize()}-hf"
    return NetworkFiles(name, (f"depth-anything/{name}",), ("config.json", "model.safetensors"))


def depth_anything_disparity(image: Float[Tensor, "h w 3"], variant: str) -> Float32[Tensor, "h w"]:
    """Disparity of every pixel, at the size of the photo.

    Raises:
        ShapeError, ImageError: not a picture.
        MissingError: transformers or the weights are not here.
        FileFormatError: the weights are damaged or another network's.
    """
    require_image("Depth Anything", image)
    network = network_files(variant)
    folder = network.find()
    model = _load(network, folder)
    pixels = prepared(image).to(model.device)  # [1 3 h' w']
    with torch.inference_mode():
        small = model(pixel_values=pixels).predicted_depth[:, None]  # [1 1 h' w']
        disparity = F.interpolate(small.float(), image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    if not torch.isfinite(disparity).all():
        todo = "the weights are damaged; fetch them again"
        raise FileFormatError(f"{network.name} in {folder} answers NaN or infinity", todo=todo)
    return disparity.cpu().clone()  # [h w], not an inference tensor


def disparity_scale(disparity: Float[Tensor, "h w"]) -> tuple[float, float]:
    """Scale and shift that make disparity inverse depth: 1 at the near end of a photo, 1 / `FAR_RATIO` at the far end.

    The shift keeps what the network calls infinitely far at a finite depth, so that it can be meshed. The official
    script shifts by a thousandth, where noise of 1/20,000 of the range already tears the far mesh, and divides by zero
    on a constant photo, which here is a plane at depth 1.
    """
    far, near = float(disparity.min()), float(np.percentile(disparity.numpy(), _NEAR_PERCENTILE))
    if near - far <= 1e-6 * max(abs(near), abs(far)):
        return 1.0, 1.0 - far
    scale = (1 - 1 / FAR_RATIO) / (near - far)
    return scale, 1 - scale * near


def prepared(image: Float[Tensor, "h w 3"]) -> Float32[Tensor, "1 3 h2 w2"]:
    """Resize and normalise a photo for the network."""
    hw = network_hw((image.shape[0], image.shape[1]), SHORT_SIDE, PATCH)
    pixels = image.detach().float().permute(2, 0, 1)[None]  # [1 3 h w]
    pixels = F.interpolate(pixels, hw, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    mean, deviation = (torch.tensor(value).view(1, 3, 1, 1) for value in (_MEAN, _DEVIATION))
    return (pixels - mean) / deviation


@load_once
def _load(network: NetworkFiles, folder: Path) -> "DepthAnythingForDepthEstimation":
    try:
        from transformers import DepthAnythingForDepthEstimation
    except ImportError as error:
        raise MissingError(f"{network.name} needs transformers", todo=INSTALL) from error
    return load_complete(DepthAnythingForDepthEstimation, folder).to(network_device())
