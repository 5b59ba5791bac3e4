"""What every matcher is: two images in, a `Match` out."""

from abc import ABC, abstractmethod
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.data.images import ImageSource, read_image
from l2m_viz.errors import ShapeError
from l2m_viz.matching.match import Match


class Matcher(ABC):
    """Base of all matchers. Images may be paths, bytes, PIL images, arrays or tensors (see `read_image`)."""

    name: str

    @overload
    def match(self, image_A: list[ImageSource], image_B: list[ImageSource]) -> list[Match]: ...
    @overload
    def match(self, image_A: ImageSource, image_B: ImageSource) -> Match: ...
    def match(
        self, image_A: ImageSource | list[ImageSource], image_B: ImageSource | list[ImageSource]
    ) -> Match | list[Match]:
        """Match two images, or two lists of images pair by pair, with the same result as one at a time.

        Raises:
            ImageError: an input is not a readable image.
            ShapeError: the two lists differ in length.
        """
        if not isinstance(image_A, list) and not isinstance(image_B, list):
            with torch.no_grad():
                return self._match_pair(read_image(image_A), read_image(image_B))
        if not isinstance(image_A, list) or not isinstance(image_B, list):
            raise ShapeError("match", expected="two images or two lists of images", got="one of each")
        if len(image_A) != len(image_B):
            raise ShapeError(
                "match", expected="lists of one length", got=f"{len(image_A)} and {len(image_B)}"
            )
        return [self.match(a, b) for a, b in zip(image_A, image_B, strict=True)]

    @abstractmethod
    def _match_pair(self, image_A: Float[Tensor, "ha wa 3"], image_B: Float[Tensor, "hb wb 3"]) -> Match:
        """Match one pair of decoded images."""
