"""The colour statistics that networks trained on ImageNet subtract and divide by."""

from jaxtyping import Float
from torch import Tensor

from l2m_viz.constants import constant

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_imagenet(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Map RGB in [0, 1] to zero mean and unit deviation over ImageNet's photos."""
    mean, std = (
        constant(values, images.device, images.dtype).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images - mean) / std
