"""What every encoder is: an image in, a grid of features out; and how to get one."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.data.images import resize_image
from l2m_viz.errors import MissingError, ShapeError


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


_ENCODERS: dict[str, Callable[[], Encoder]] = {"dense-sift": DenseSift}


def load_encoder(name: str) -> Encoder:
    """Make an encoder by its name.

    Raises:
        MissingError: there is no such encoder.
    """
    if name not in _ENCODERS:
        raise MissingError(f"no encoder named '{name}'", expected=f"one of {', '.join(_ENCODERS)}")
    return _ENCODERS[name]()
