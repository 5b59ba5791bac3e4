"""What every encoder is: an image in, a grid of features out; and how to get one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from l2m_viz.data.images import resize_image
from l2m_viz.encoders import dinov2, weights as checkpoints
from l2m_viz.encoders.conv_pyramid import load_pyramid
from l2m_viz.encoders.dinov2 import DinoCfg, DinoViT
from l2m_viz.encoders.imagenet import normalize_imagenet
from l2m_viz.encoders.shipped import Shipped
from l2m_viz.encoders.vgg import VGG19Pyramid
from l2m_viz.encoders.weights import Checkpoint, load_strict, resolve_device
from l2m_viz.errors import L2MError, MissingError, ShapeError


class Encoder(ABC):
    """A map from images to features whose cells tile the image: the centre of cell i is at (i + 0.5) W / w px."""

    name: str
    stride: int
    dim: int

    def __call__(self, image: Float[Tensor, "H W 3"]) -> Float[Tensor, "h w {self.dim}"]:
        """Return the features (h, w, dim) of an image, h = ceil(H / stride) and w = ceil(W / stride).

        An image whose sides are not multiples of the stride is resized up to the next ones.

        Raises:
            ShapeError: the image is not (H, W, 3).
        """
        if image.ndim != 3 or image.shape[-1] != 3:
            raise ShapeError(
                f"encoder '{self.name}'", expected="image (H, W, 3)", got=str(tuple(image.shape))
            )
        height, width = (-(-side // self.stride) * self.stride for side in image.shape[:2])
        return self._encode(resize_image(image, (height, width)))

    @abstractmethod
    def _encode(self, image: Float[Tensor, "H W 3"]) -> Tensor:
        """Features of an image whose sides are multiples of the stride."""


class DenseSift(Encoder):
    """RootSIFT at every cell (Liu et al., SIFT Flow, 2011), through kornia: hand-made, no weights.

    Each descriptor is 4x4 spatial bins of 4 px, so it sees 16x16 px around the cell's centre, 8 orientations a bin.
    """

    name = "dense-sift"
    stride = 4
    dim = 128

    def _encode(self, image: Float[Tensor, "H W 3"]) -> Tensor:
        from kornia.color import rgb_to_grayscale
        from kornia.feature import DenseSIFTDescriptor

        # kornia centres output j at 4 j - padding + 5.5 in integer-centre pixels; our cell's centre is at 4 j + 1.5.
        sift = DenseSIFTDescriptor(num_spatial_bins=4, spatial_bin_size=4, stride=self.stride, padding=4)
        with torch.no_grad():
            return sift(rgb_to_grayscale(image.permute(2, 0, 1)[None]))[0].permute(1, 2, 0).contiguous()


class NetworkEncoder(Encoder):
    """One level of a network.

    Attributes:
        network: Gives the features (1, D, h, w) of images (1, 3, H, W), RGB in [0, 1].
    """

    def __init__(
        self, name: str, network: Callable[[Tensor], Tensor], stride: int, dim: int, device: torch.device
    ) -> None:
        self.name, self.network, self.stride, self.dim, self.device = name, network, stride, dim, device

    def _encode(self, image: Float[Tensor, "H W 3"]) -> Tensor:
        images = image.permute(2, 0, 1)[None].to(self.device)
        with torch.no_grad():
            features = self.network(images)
        return features[0].permute(1, 2, 0).float().cpu().contiguous()


def _dense_sift(weights: str | Path | None, device: torch.device) -> Encoder:
    if weights is not None:
        raise L2MError("encoder 'dense-sift'", expected="no weights", got=str(weights), todo="leave them out")
    return DenseSift()


def _vgg19(weights: str | Path | None, device: torch.device) -> Encoder:
    """The level at stride 8, the coarsest and most abstract of those that RoMa reads."""
    with torch.device("meta"):
        pyramid = VGG19Pyramid()
    load_strict(pyramid, checkpoints.VGG19_BN.read(weights), "VGG19-bn").to(device).eval()
    return NetworkEncoder(
        "vgg19-bn", lambda images: pyramid(normalize_imagenet(images))[8], 8, pyramid.channels[8], device
    )


def _dinov2(
    checkpoint: Checkpoint, cfg: DinoCfg, weights: str | Path | None, device: torch.device
) -> Encoder:
    with torch.device("meta"):
        vit = DinoViT(cfg)
    load_strict(vit, checkpoint.read(weights), checkpoint.name).to(device).eval()
    return NetworkEncoder(
        checkpoint.name, lambda images: vit(normalize_imagenet(images)), cfg.patch_size, cfg.dim, device
    )


_TINY_STRIDE = 8  # of the map that the way back up ends in
# The 3D-aware encoder of l2m-tiny, and the one that it was made from, which saw photos as flat prints only.
TINY_ENCODER = Shipped.named("l2m-tiny-encoder.safetensors")
TINY_2D_ENCODER = Shipped.named("l2m-tiny-2d-encoder.safetensors")


def _tiny(name: str, shipped: Shipped, weights: str | Path | None, device: torch.device) -> Encoder:
    if weights is None and shipped.find() is None:
        todo = "train one with `l2m train encoder PHOTOS` and name its file as weights"
        raise MissingError(f"encoder '{name}'", expected=shipped.where(), todo=todo)
    pyramid = load_pyramid(weights or shipped.path).to(device)
    dim, coarsest = pyramid.channels[_TINY_STRIDE], pyramid.strides[-1]

    def features(images: Tensor) -> Tensor:
        """Repeat the border up to whole cells of the coarsest map, and leave out what was added."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % coarsest, 0, -height % coarsest), mode="replicate")
        return pyramid(padded)[_TINY_STRIDE][..., : height // _TINY_STRIDE, : width // _TINY_STRIDE]

    return NetworkEncoder(name, features, _TINY_STRIDE, dim, device)


# Each is made from a file of weights (None: the published one) and a device.
_ENCODERS: dict[str, Callable[[str | Path | None, torch.device], Encoder]] = {
    "l2m-tiny": partial(_tiny, "l2m-tiny", TINY_ENCODER),
    "l2m-tiny-2d": partial(_tiny, "l2m-tiny-2d", TINY_2D_ENCODER),
    "dense-sift": _dense_sift,
    "vgg19-bn": _vgg19,
    "dinov2-vits14": partial(_dinov2, checkpoints.DINOV2_VITS14, dinov2.DINOV2_VITS14),
    "dinov2-vitb14": partial(_dinov2, checkpoints.DINOV2_VITB14, dinov2.DINOV2_VITB14),
    "dinov2-vitl14": partial(_dinov2, checkpoints.DINOV2_VITL14, dinov2.DINOV2_VITL14),
}


def load_encoder(
    name: str, weights: str | Path | None = None, device: str | torch.device = "auto"
) -> Encoder:
    """Make an encoder by its name.

    Args:
        name: "l2m-tiny" (3D-aware), "l2m-tiny-2d", "dense-sift", "vgg19-bn", "dinov2-vits14",
            "dinov2-vitb14" or "dinov2-vitl14".
        weights: A file of weights in the published format; None takes the published ones: those of l2m-tiny come with
            the package, others are downloaded at first use.
        device: Where it computes; "auto" is the GPU if torch sees one.

    Raises:
        MissingError: there is no such encoder, or its weights are not here and cannot be fetched.
        FileFormatError: the weights are damaged or another network's.
        L2MError: this encoder has no weights.
    """
    if name not in _ENCODERS:
        raise MissingError(f"no encoder named '{name}'", expected=f"one of {', '.join(_ENCODERS)}")
    return _ENCODERS[name](weights, resolve_device(device))
