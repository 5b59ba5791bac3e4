"""Photometric augmentation: another camera, another light, another sensor, and every pixel where it was.

Each image has draws of its own, a function of its seed and the settings alone, so the two views of a pair differ and a
batch is what its images are one by one. In the order of a camera: what the sensor sees (`modalities`), colour, tone,
vignetting, something in front of the lens, blur, noise, resampling, JPEG (`degradations`).

Colour is one affine map of the pixels x. In Y, Cb and Cr (`degradations.LUMA`) saturation scales and hue turns the
chroma, white balance and brightness are factors of the channels, contrast is about the mean luma m:

    C = brightness diag(white_balance) RGB_FROM_YCC [1, saturation R(hue)] YCC_FROM_RGB
    x -> contrast (C x) + (1 - contrast) m(C x),  then  clip(x)^gamma
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from l2m_viz.data.images import require_image
from l2m_viz.errors import ImageError, L2MError, ShapeError
from l2m_viz.training.degradations import (
    LUMA,
    RGB_FROM_YCC,
    YCC_FROM_RGB,
    add_noise,
    as_tensor,
    compress,
    gaussian_blur,
    motion_blur,
    resample,
    vignette,
)
from l2m_viz.training.modalities import Modality, edges, false_colors, sketch


@dataclass(frozen=True)
class Effect:
    """How often an effect occurs, and the range of its strength."""

    probability: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or not -math.inf < self.low <= self.high < math.inf:
            expected = "a probability in [0, 1] and finite low <= high"
            raise L2MError("Effect", expected=expected, got=str(self))


_TINY = 1e-3
_ANY, _POSITIVE, _SHARE = (0.0, math.inf), (_TINY, math.inf), (0.0, 1.0)
# What makes sense of an effect's strength; an angle may be any.
_LIMITS = {
    "brightness": _POSITIVE,
    "contrast": _POSITIVE,
    "gamma": _POSITIVE,
    "white_balance": _POSITIVE,
    "saturation": _ANY,
    "vignette": _SHARE,
    "blur_sigma": _POSITIVE,
    "motion_length": (1.0, math.inf),
    "read_noise": _ANY,
    "shot_noise": _ANY,
    "resample_scale": (_TINY, 1.0),
    "jpeg_quality": (1.0, 100.0),
    "patch": _SHARE,
}


@dataclass(frozen=True)
class AugmentCfg:
    """Which effects an image gets. Pixels are those of the image that is augmented."""

    # Factors, drawn so that their logarithm is uniform.
    brightness: Effect = Effect(0.5, 0.6, 1.4)
    contrast: Effect = Effect(0.5, 0.6, 1.4)
    gamma: Effect = Effect(0.4, 0.7, 1.5)
    white_balance: Effect = Effect(0.3, 0.85, 1.18)  # of each channel
    # The rest is drawn uniformly.
    saturation: Effect = Effect(0.4, 0.3, 1.6)
    hue_deg: Effect = Effect(0.3, -20.0, 20.0)
    vignette: Effect = Effect(0.15, 0.1, 0.5)  # share that the corners lose
    blur_sigma: Effect = Effect(0.15, 0.4, 1.5)  # px
    motion_length: Effect = Effect(0.08, 3.0, 9.0)  # px, in any direction
    read_noise: Effect = Effect(0.3, 0.005, 0.04)  # standard deviation
    shot_noise: Effect = Effect(0.2, 0.0005, 0.005)  # variance of white
    resample_scale: Effect = Effect(0.15, 0.4, 0.9)
    jpeg_quality: Effect = Effect(0.3, 25.0, 90.0)
    # Sides of a rectangle of one colour, shares of the image's. Off: the truth still counts what it hides as seen.
    patch: Effect = Effect(0.0, 0.05, 0.25)
    # What the sensor shows, at most one of these; what is left of 1 is a colour photo.
    grey: float = 0.1
    false_color: float = 0.0
    edges: float = 0.0
    sketch: float = 0.0
    # Black becomes white, in any of them.
    inverted: float = 0.0

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            low, high = getattr(self, name).low, getattr(self, name).high
            if low < least or high > most:
                expected = f"strengths from {least:g} to {most:g}"
                raise L2MError(f"AugmentCfg {name}", expected=expected, got=f"({low:g}, {high:g})")
        chances = (*self.modalities.values(), self.inverted)
        if not all(0 <= chance <= 1 for chance in chances) or sum(self.modalities.values()) > 1 + 1e-9:
            expected = "probabilities in [0, 1], those of the modalities not above 1 together"
            got = f"{self.modalities}, inverted {self.inverted:g}"
            raise L2MError("AugmentCfg", expected=expected, got=got)

    @property
    def modalities(self) -> dict[Modality, float]:
        """Probability of each modality but colour."""
        return {
            "grey": self.grey,
            "false-color": self.false_color,
            "edges": self.edges,
            "sketch": self.sketch,
        }


# Two images in three are no plain colour photos, so nine pairs in ten have at least one such.
CROSS_MODAL = AugmentCfg(grey=0.2, false_color=0.2, edges=0.1, sketch=0.1, inverted=0.2)


@dataclass(frozen=True)
class Augmentation:
    """What happens to one image; the defaults do nothing. Fields as in `AugmentCfg`."""

    brightness: float = 1.0
    contrast: float = 1.0
    gamma: float = 1.0
    white_balance: tuple[float, float, float] = (1.0, 1.0, 1.0)
    saturation: float = 1.0
    hue_deg: float = 0.0
    vignette: float = 0.0
    blur_sigma: float = 0.0
    motion_length: float = 1.0
    motion_deg: float = 0.0
    read_noise: float = 0.0
    shot_noise: float = 0.0
    noise_seed: int = 0
    resample_scale: float = 1.0
    jpeg_quality: int | None = None
    # Left, top, width and height of the patch, shares of the image's, and its colour.
    patch: tuple[float, float, float, float] | None = None
    patch_color: tuple[float, float, float] = (0.5, 0.5, 0.5)
    modality: Modality = "color"
    inverted: bool = False
    false_color_frequencies: tuple[float, float, float] = (1.0, 1.0, 1.0)
    false_color_phases: tuple[float, float, float] = (0.0, 0.0, 0.0)
    sketch_sigma: float = 3.0


def sample_augmentation(cfg: AugmentCfg, seed: int) -> Augmentation:
    """Draw what happens to one image.

    Every draw has a place of its own in the seed's sequence: the probability of one effect changes no other.
    """
    draws = _Draws(seed)
    return Augmentation(
        noise_seed=draws.seed(),
        modality=draws.modality(cfg),
        inverted=draws.share() < cfg.inverted,
        brightness=draws.factor(cfg.brightness),
        contrast=draws.factor(cfg.contrast),
        gamma=draws.factor(cfg.gamma),
        white_balance=draws.white_balance(cfg.white_balance),
        saturation=draws.strength(cfg.saturation, 1.0),
        hue_deg=draws.strength(cfg.hue_deg, 0.0),
        vignette=draws.strength(cfg.vignette, 0.0),
        blur_sigma=draws.strength(cfg.blur_sigma, 0.0),
        motion_length=draws.strength(cfg.motion_length, 1.0),
        motion_deg=180 * draws.share(),
        read_noise=draws.strength(cfg.read_noise, 0.0),
        shot_noise=draws.strength(cfg.shot_noise, 0.0),
        resample_scale=draws.strength(cfg.resample_scale, 1.0),
        jpeg_quality=draws.quality(cfg.jpeg_quality),
        patch=draws.patch(cfg.patch),
        patch_color=draws.shares(),
        # From half a period, which keeps every edge in every channel, to what gives two or three greys the same value.
        false_color_frequencies=draws.shares(0.5, 1.25),
        false_color_phases=draws.shares(),
        sketch_sigma=2 + 3 * draws.share(),
    )


class _Draws:
    """Random numbers of one seed; every method takes as many, whatever it returns."""

    def __init__(self, seed: int) -> None:
        # A domain of its own: the seed of a pair may serve here, too. numpy, because torch on the CPU ignores the
        # upper 32 bits of a seed.
        self._rng = np.random.default_rng([seed % 2**64, _DOMAIN])

    def seed(self) -> int:
        return int(self._rng.integers(2**62))

    def share(self) -> float:
        return float(self._rng.random())

    def shares(self, low: float = 0.0, high: float = 1.0) -> tuple[float, float, float]:
        red, green, blue = self._rng.uniform(low, high, 3).tolist()
        return red, green, blue

    def strength(self, effect: Effect, neutral: float) -> float:
        chance, place = self.share(), self.share()
        return effect.low + (effect.high - effect.low) * place if chance < effect.probability else neutral

    def factor(self, effect: Effect) -> float:
        chance, place = self.share(), self.share()
        return effect.low * (effect.high / effect.low) ** place if chance < effect.probability else 1.0

    def white_balance(self, effect: Effect) -> tuple[float, float, float]:
        chance, (red, green, blue) = self.share(), self.shares(math.log(effect.low), math.log(effect.high))
        return (
            (math.exp(red), math.exp(green), math.exp(blue))
            if chance < effect.probability
            else (1.0, 1.0, 1.0)
        )

    def quality(self, effect: Effect) -> int | None:
        quality = self.strength(effect, math.inf)
        return None if quality == math.inf else round(quality)

    def patch(self, effect: Effect) -> tuple[float, float, float, float] | None:
        chance, x, y = self.share(), self.share(), self.share()
        width, height = self._rng.uniform(effect.low, effect.high, 2).tolist()
        return (x * (1 - width), y * (1 - height), width, height) if chance < effect.probability else None

    def modality(self, cfg: AugmentCfg) -> Modality:
        place = self.share()
        for name, chance in cfg.modalities.items():
            place -= chance
            if place < 0:
                return name
        return "color"


_DOMAIN = 0x617567  # "aug"


def augment(
    images: Float[Tensor, "b h w 3"],
    cfg: AugmentCfg | None = None,
    generator: torch.Generator | None = None,
    *,
    seeds: Int64[Tensor, " b"] | None = None,
) -> Float[Tensor, "b h w 3"]:
    """Change the look of each image by draws of its own; nothing moves.

    Args:
        images: RGB in [0, 1], float32, on any device. On a GPU their values are not checked: it would have to wait.
        cfg: Settings.
        generator: Draws the images' seeds.
        seeds: The seeds themselves, to do the same again; then ``generator`` is not used. An image's result depends
            on its seed, not on the batch, and on the device only in its noise.

    Raises:
        ShapeError: not (B, H, W, 3), an image without pixels, or not one seed for each image.
        ImageError: not float32 with values in [0, 1].
    """
    cfg = cfg or AugmentCfg()
    if seeds is None:
        seeds = torch.randint(0, 2**62, (len(images),), generator=generator)
    if seeds.shape != images.shape[:1]:
        raise ShapeError("augment seeds", expected=f"{len(images)} of them", got=str(tuple(seeds.shape)))
    augmentations = [sample_augmentation(cfg, seed) for seed in seeds.tolist()]
    return apply_augmentations(images, augmentations)


def apply_augmentations(
    images: Float[Tensor, "b h w 3"], augmentations: Sequence[Augmentation]
) -> Float[Tensor, "b h w 3"]:
    """Change the look of each image as its `Augmentation` says.

    Raises:
        ShapeError: not (B, H, W, 3), an image without pixels, or not one augmentation for each image.
        ImageError: not float32 with values in [0, 1].
    """
    _check_images(images)
    if len(augmentations) != len(images):
        expected = f"{len(images)} augmentations"
        raise ShapeError("apply_augmentations", expected=expected, got=str(len(augmentations)))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    # One image at a time: on the CPU it stays in the cache, and effects that it has not cost nothing. Autocast, which a
    # training may be in, would compute colours in half precision.
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for image, augmentation, target in zip(images, augmentations, out, strict=True):
            planes = _degraded(_developed(image, augmentation), augmentation)
            target.copy_(planes.permute(1, 2, 0))  # one plane of grey becomes three channels
    return out


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        expected = "(B, H, W, 3) with at least one pixel"
        raise ShapeError("images to augment", expected=expected, got=str(tuple(images.shape)))
    if images.dtype != torch.float32:
        raise ImageError("images to augment", expected="float32 in [0, 1]", got=str(images.dtype))
    if images.device.type == "cpu" and len(images):
        require_image("augment", images.flatten(0, 1))


def _developed(image: Float[Tensor, "h w 3"], augmentation: Augmentation) -> Float[Tensor, "c h w"]:
    """Colour and tone: three planes, or one of grey."""
    height, width = image.shape[:2]
    pixels = image.reshape(-1, 3).T  # [3 hw]
    modality = augmentation.modality
    if modality == "color":
        planes = _colored(pixels, _color_matrix(augmentation), LUMA, augmentation)
    elif modality == "grey":
        planes = _colored(pixels, augmentation.brightness * LUMA[None], np.ones(1), augmentation)
    else:
        luma = (as_tensor(LUMA[None], pixels) @ pixels).view(1, height, width)
        shown = _shown(luma, augmentation).flatten(1)
        if len(shown) == 3:
            planes = _colored(shown, _color_matrix(augmentation), LUMA, augmentation)
        else:
            planes = _colored(shown, np.full((1, 1), augmentation.brightness), np.ones(1), augmentation)
    planes = planes.clamp_(0, 1)
    if augmentation.gamma != 1:
        planes.log_().mul_(augmentation.gamma).exp_()  # five times as fast as pow; 0 stays 0 by way of -inf
    return planes.view(-1, height, width)


def _shown(luma: Float[Tensor, "1 h w"], augmentation: Augmentation) -> Float[Tensor, "c h w"]:
    """What a sensor of another kind shows."""
    if augmentation.modality == "false-color":
        return false_colors(luma, augmentation.false_color_frequencies, augmentation.false_color_phases)
    if augmentation.modality == "edges":
        return edges(luma)
    return sketch(luma, augmentation.sketch_sigma)


def _color_matrix(augmentation: Augmentation) -> Float64[np.ndarray, "3 3"]:
    """Brightness, white balance, hue and saturation."""
    angle = math.radians(augmentation.hue_deg)
    cosine, sine = (augmentation.saturation * turn for turn in (math.cos(angle), math.sin(angle)))
    chroma = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    gain = augmentation.brightness * np.array(augmentation.white_balance)
    return gain[:, None] * (RGB_FROM_YCC @ chroma @ YCC_FROM_RGB)


def _colored(
    values: Float[Tensor, "n hw"],
    matrix: Float64[np.ndarray, "c n"],
    luma: Float64[np.ndarray, " c"],
    augmentation: Augmentation,
) -> Float[Tensor, "c hw"]:
    """Apply a colour matrix, contrast and inversion in one pass over the pixels; ``luma`` weighs the outcome."""
    contrast, sign, offset = augmentation.contrast, 1, np.zeros(len(matrix))
    if augmentation.inverted:  # 1 - x instead of x
        sign, offset = -1, matrix.sum(axis=1)
    bias = as_tensor(contrast * offset, values)
    if contrast != 1:
        mean = as_tensor(sign * (luma @ matrix), values) @ values.mean(dim=1) + float(luma @ offset)
        bias = bias + (1 - contrast) * mean
    return torch.addmm(bias[:, None], as_tensor(sign * contrast * matrix, values), values)


def _degraded(planes: Float[Tensor, "c h w"], augmentation: Augmentation) -> Float[Tensor, "c h w"]:
    """Lens, sensor and file."""
    if augmentation.vignette:
        planes = vignette(planes, augmentation.vignette)
    if augmentation.patch is not None:
        _cover(planes, augmentation.patch, augmentation.patch_color)
    if augmentation.motion_length > 1:
        planes = motion_blur(planes, augmentation.motion_length, augmentation.motion_deg)
    if augmentation.blur_sigma:
        planes = gaussian_blur(planes, augmentation.blur_sigma)
    if augmentation.read_noise or augmentation.shot_noise:
        noise = torch.Generator(planes.device).manual_seed(augmentation.noise_seed)
        planes = add_noise(planes, augmentation.read_noise, augmentation.shot_noise, noise).clamp_(0, 1)
    if augmentation.resample_scale < 1:
        planes = resample(planes, augmentation.resample_scale)
    if augmentation.jpeg_quality is not None:
        planes = compress(planes, augmentation.jpeg_quality)
    return planes.clamp_(0, 1)


def _cover(
    planes: Float[Tensor, "c h w"],
    patch: tuple[float, float, float, float],
    color: tuple[float, float, float],
) -> None:
    """Paint a rectangle, in place."""
    height, width = planes.shape[1:]
    left, top, right, bottom = patch[0], patch[1], patch[0] + patch[2], patch[1] + patch[3]
    rows = slice(round(top * height), round(bottom * height))
    columns = slice(round(left * width), round(right * width))
    value = planes.new_tensor(color if len(planes) == 3 else color[:1])
    planes[:, rows, columns] = value[:, None, None]
