"""Pairs to start with, written as PNG, and their exact correspondence where it is known."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data import Sample, load_sample, to_uint8, write_image
from l2m_viz.geometry import HW, inside_image, pixel_grid, sample_image, to_normalized

_ROTATION_DEG = 12.0
_SCALE = 0.9  # of A in B: B sees a little more than its size says
_TURNED_HW: HW = (360, 420)


@dataclass(frozen=True)
class Truth:
    """Where each pixel of A really is in B; ``known`` says where ``covisible`` was measured."""

    warp: Float[Tensor, "h w 2"]
    covisible: Bool[Tensor, "h w"]
    known: Bool[Tensor, "h w"]


@dataclass(frozen=True)
class Example:
    """A pair of files, and the truth if there is one."""

    label: str
    path_A: Path
    path_B: Path
    digests: tuple[bytes, bytes]
    truth: Truth | None = None


def write_examples(folder: str | Path) -> list[Example]:
    """Write the pictures of all examples into ``folder``."""
    folder = Path(folder)
    stereo, portrait = load_sample("motorcycle"), load_sample("astronaut")
    assert stereo.image_B is not None
    turned_image, turned_truth = turned(portrait.image_A)
    pictures = {
        "motorcycle_left": stereo.image_A,
        "motorcycle_right": stereo.image_B,
        "astronaut": portrait.image_A,
        "astronaut_turned": turned_image,
        "coffee": load_sample("coffee").image_A,
    }
    paths = {name: folder / f"{name}.png" for name in pictures}
    for name, image in pictures.items():
        write_image(paths[name], image)

    def example(label: str, name_A: str, name_B: str, truth: Truth | None = None) -> Example:
        digests = (_digest(pictures[name_A]), _digest(pictures[name_B]))
        return Example(label, paths[name_A], paths[name_B], digests, truth)

    return [
        example("stereo pair, measured truth", "motorcycle_left", "motorcycle_right", _measured(stereo)),
        example("turned by 12°, exact truth", "astronaut", "astronaut_turned", turned_truth),
        example("two unrelated photos", "astronaut", "coffee"),
    ]


def find_truth(
    examples: list[Example], image_A: Float[Tensor, "ha wa 3"], image_B: Float[Tensor, "hb wb 3"]
) -> Truth | None:
    """Look the pair up by its pixels: files come back from the browser as copies under other names."""
    wanted = _digest(image_A), _digest(image_B)
    return next((example.truth for example in examples if example.digests == wanted), None)


def turned(image: Float[Tensor, "h w 3"]) -> tuple[Float[Tensor, "h2 w2 3"], Truth]:
    """Rotate and crop a photo about its centre; p_B = c_B + s R (p_A - c_A) is exact for every pixel."""
    hw = (image.shape[0], image.shape[1])
    cos, sin = (_SCALE * f(math.radians(_ROTATION_DEG)) for f in (math.cos, math.sin))
    matrix = torch.tensor([[cos, -sin], [sin, cos]])
    center_A, center_B = (torch.tensor([size[1] / 2, size[0] / 2]) for size in (hw, _TURNED_HW))
    points_A = (pixel_grid(_TURNED_HW) - center_B) @ torch.linalg.inv(matrix).T + center_A
    warp = to_normalized((pixel_grid(hw) - center_A) @ matrix.T + center_B, _TURNED_HW)
    everywhere = torch.ones(hw, dtype=torch.bool)
    return sample_image(image, to_normalized(points_A, hw)), Truth(warp, inside_image(warp), everywhere)


def _measured(sample: Sample) -> Truth:
    assert (
        sample.warp_A_to_B is not None
        and sample.covisibility_A_to_B is not None
        and sample.valid_A is not None
    )
    return Truth(sample.warp_A_to_B, sample.covisibility_A_to_B, sample.valid_A)


def _digest(image: Float[Tensor, "h w 3"]) -> bytes:
    pixels = to_uint8(image)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
