"""What every matcher is: two images in, a `Match` out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.data.images import ImageSource, read_image
from l2m_viz.errors import ShapeError
from l2m_viz.matching.match import Match

ImagePair = tuple[Tensor, Tensor]  # decoded, (H, W, 3)


Precision = Literal["float32", "bfloat16"]


def fastest_precision(device: torch.device) -> Precision:
    """Bfloat16 where the processor multiplies it in hardware; elsewhere it is slower, on some a hundred times."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    in_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device.type == "cpu" and in_hardware else "float32"


class Matcher(ABC):
    """Base of all matchers. Images may be paths, bytes, PIL images, arrays or tensors (see `read_image`)."""

    name: str

    @overload
    def match(
        self,
        image_A: list[ImageSource],
        image_B: list[ImageSource],
        generator: torch.Generator | None = None,
        stages: bool = False,
    ) -> list[Match]: ...
    @overload
    def match(
        self,
        image_A: ImageSource,
        image_B: ImageSource,
        generator: torch.Generator | None = None,
        stages: bool = False,
    ) -> Match: ...
    def match(
        self,
        image_A: ImageSource | list[ImageSource],
        image_B: ImageSource | list[ImageSource],
        generator: torch.Generator | None = None,
        stages: bool = False,
    ) -> Match | list[Match]:
        """Match two images, or two lists of images pair by pair, with the same result as one at a time.

        Args:
            image_A: One image or a list.
            image_B: As many.
            generator: For matchers that draw random numbers; those of this package do not.
            stages: Keep what each stage of a network said in `Match.stages`; other matchers have none.

        Raises:
            ImageError: an input is not a readable image.
            ShapeError: the two lists differ in length.
        """
        if not isinstance(image_A, list) and not isinstance(image_B, list):
            return next(self._match_all(iter([(image_A, image_B)]), stages))
        if not isinstance(image_A, list) or not isinstance(image_B, list):
            raise ShapeError("match", expected="two images or two lists of images", got="one of each")
        if len(image_A) != len(image_B):
            raise ShapeError(
                "match", expected="lists of one length", got=f"{len(image_A)} and {len(image_B)}"
            )
        return list(self._match_all(zip(image_A, image_B, strict=True), stages))

    def _match_all(self, sources: Iterator[tuple[ImageSource, ImageSource]], stages: bool) -> Iterator[Match]:
        """Read and match pair by pair: a long list of photos is never in memory at once."""
        with torch.no_grad():
            yield from self._match_pairs(((read_image(a), read_image(b)) for a, b in sources), stages)

    def _match_pairs(self, pairs: Iterator[ImagePair], stages: bool) -> Iterator[Match]:
        """Match decoded pairs in order; a matcher with batches or stages does more than this."""
        del stages
        return (self._match_pair(image_A, image_B) for image_A, image_B in pairs)

    @abstractmethod
    def _match_pair(self, image_A: Float[Tensor, "ha wa 3"], image_B: Float[Tensor, "hb wb 3"]) -> Match:
        """Match one pair of decoded images."""
