"""The matching network behind the `Match` that every matcher returns: sizes, batches, both passes, certainty."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.encoders.imagenet import normalize_imagenet
from l2m_viz.encoders.weights import resolve_device
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import HW, inside_image
from l2m_viz.lifting.networks import network_hw
from l2m_viz.matching.match import Match, Stage
from l2m_viz.matching.matcher import ImagePair, Matcher, Precision
from l2m_viz.matching.network import DenseNetwork
from l2m_viz.matching.stages import StageOutput

_ATTENUATION = 0.5  # RoMa's share of the coarse logit


class DenseMatcher(Matcher):
    """A `DenseNetwork` as a matcher: symmetric, with a second pass on larger images if the settings have one."""

    @dataclass(frozen=True)
    class Cfg:
        """Settings of `DenseMatcher`; the defaults are those of L2M++ in its authors' benchmarks.

        Attributes:
            resolution: Size (H, W) that images are resized to, multiples of the coarse stride.
            upsample_resolution: Size of a second pass without the coarse stage; None: there is none.
            keep_aspect: Take the shorter side of a resolution as that of the image, and keep the image's aspect, but
                for rounding to multiples of the coarse stride.
            imagenet_normalised: Whether the network was trained on images with ImageNet's mean and deviation removed.
            attenuate: Correct the final certainty by the coarse one, as RoMa does.
            precision: Of encoder, decoder and refiners; geometry, correlation and the Gaussian process are float32.
            batch_size: Pairs of one size that run together when lists are matched.
        """

        resolution: HW = (560, 560)
        upsample_resolution: HW | None = (864, 864)
        keep_aspect: bool = False
        imagenet_normalised: bool = False
        attenuate: bool = True
        precision: Precision = "float32"
        batch_size: int = 1

    def __init__(
        self, name: str, network: DenseNetwork, cfg: Cfg | None = None, device: torch.device | str = "auto"
    ) -> None:
        self.name = name
        self.cfg = cfg or self.Cfg()
        self.device = resolve_device(device)
        self.network = network.eval().to(self.device)
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._check_resolutions()

    def _match_pair(self, image_A: Float[Tensor, "ha wa 3"], image_B: Float[Tensor, "hb wb 3"]) -> Match:
        return next(self._match_pairs(iter([(image_A, image_B)]), stages=False))

    def _match_pairs(self, pairs: Iterator[ImagePair], stages: bool) -> Iterator[Match]:
        while several := list(islice(pairs, self.cfg.batch_size)):
            for _, alike in groupby(several, key=self._working_sizes):
                yield from self._match_batch(list(alike), stages)

    def _match_batch(self, pairs: list[ImagePair], stages: bool) -> list[Match]:
        """Match pairs whose working sizes are the same."""
        there, back = self._run(pairs)
        seen = torch.tensor([not (_is_blank(image_A) or _is_blank(image_B)) for image_A, image_B in pairs])
        cells = zip(self._finish(there, seen), self._finish(back, seen), strict=True)
        return [
            Match(
                *a, *b, _hw(image_A), _hw(image_B), matcher=self.name,
                stages=_stages(there, back, index) if stages else (),
            )
            for index, ((a, b), (image_A, image_B)) in enumerate(zip(cells, pairs, strict=True))
        ]  # fmt: skip

    def _run(self, pairs: list[ImagePair]) -> tuple[list[StageOutput], list[StageOutput]]:
        """All stages of both passes, both ways."""
        enabled = self.cfg.precision == "bfloat16"
        # no cache: it would keep a second copy of all weights
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
            there, back = self.network(*self._batch(pairs, self.cfg.resolution))
            if self.cfg.upsample_resolution is None:
                return there, back
            scale_factor = math.sqrt(math.prod(self.cfg.upsample_resolution) / math.prod(self.cfg.resolution))
            larger = self._batch(pairs, self.cfg.upsample_resolution)
            there_up, back_up = self.network.upsample(*larger, (there[-1], back[-1]), scale_factor)
            return there + there_up, back + back_up

    def _batch(self, pairs: list[ImagePair], resolution: HW) -> tuple[Tensor, Tensor]:
        """Images A and images B, resized and stacked, (B, 3, H, W)."""
        images_A, images_B = (
            torch.cat([self._prepare(image, resolution) for image in images])
            for images in zip(*pairs, strict=True)
        )
        return images_A, images_B

    def _prepare(self, image: Float[Tensor, "h w 3"], resolution: HW) -> Float[Tensor, "1 3 h2 w2"]:
        """Resize as Pillow's bicubic does, which the official weights have seen."""
        channels_first = image.to(self.device).permute(2, 0, 1)[None]
        size = self._working_hw(_hw(image), resolution)
        if channels_first.shape[-2:] != size:
            channels_first = F.interpolate(
                channels_first, size, mode="bicubic", align_corners=False, antialias=True
            ).clamp(0, 1)
        channels_first = channels_first.contiguous(memory_format=torch.channels_last)
        return normalize_imagenet(channels_first) if self.cfg.imagenet_normalised else channels_first

    def _working_hw(self, hw: HW, resolution: HW) -> HW:
        if not self.cfg.keep_aspect:
            return resolution
        return network_hw(hw, min(resolution), self.network.cfg.coarse.stride)

    def _working_sizes(self, pair: ImagePair) -> list[HW]:
        """Sizes of both images in both passes."""
        resolutions = [self.cfg.resolution, self.cfg.upsample_resolution or self.cfg.resolution]
        return [self._working_hw(_hw(image), resolution) for image in pair for resolution in resolutions]

    def _finish(self, stages: list[StageOutput], seen: Bool[Tensor, " b"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Warp (h, w, 2) inside the other image, and certainty (h, w), of each pair of the batch.

        ``seen``: there is something in both images; else nothing is certain.
        """
        logit = stages[-1].certainty_logit.float()
        if self.cfg.attenuate:
            logit = logit - _ATTENUATION * self._doubt(stages, logit.shape[-2:])
        warp = stages[-1].warp.float().permute(0, 2, 3, 1)
        certainty = logit[:, 0].sigmoid() * inside_image(warp) * seen.to(logit.device)[:, None, None]
        return zip(warp.clamp(-1, 1).cpu(), certainty.cpu(), strict=True)

    def _doubt(self, stages: list[StageOutput], size: torch.Size) -> Float[Tensor, "b 1 h w"]:
        """The coarse stage's negative logits.

        Subtracting them *raises* the final logit where the coarse stage was in doubt, against the name that RoMa gives
        to it; thresholds on the published weights' certainties are used to that.
        """
        stride = self.network.cfg.coarse.stride
        coarse = next(
            stage for stage in reversed(stages) if stage.stride == stride
        )  # after its refiner, if it has one
        logit = coarse.certainty_logit.float()
        return F.interpolate(logit, size=size, mode="bilinear", align_corners=False).clamp(max=0)

    def _check_resolutions(self) -> None:
        stride = self.network.cfg.coarse.stride
        for side in self.cfg.resolution:
            if side < stride or side % stride:
                raise ShapeError(
                    f"resolution of matcher '{self.name}'",
                    expected=f"(H, W) in multiples of {stride} px",
                    got=str(tuple(self.cfg.resolution)),
                )
        # the finest level that the second pass starts from must have a cell
        coarsest = max(refiner.stride for refiner in self.network.cfg.refiners)
        if self.cfg.upsample_resolution is not None and min(self.cfg.upsample_resolution) < coarsest:
            raise ShapeError(
                f"upsample_resolution of matcher '{self.name}'",
                expected=f"(H, W) of at least {coarsest} px",
                got=str(tuple(self.cfg.upsample_resolution)),
            )


def _stages(there: list[StageOutput], back: list[StageOutput], index: int) -> tuple[Stage, ...]:
    """The stages of one pair of the batch, channels last."""
    stages = []
    for a, b in zip(there, back, strict=True):
        (warp_A, certainty_A, moved_A, probs_A), (warp_B, certainty_B, moved_B, probs_B) = (
            _maps(stage, index) for stage in (a, b)
        )
        stages.append(
            Stage(a.stride, warp_A, certainty_A, warp_B, certainty_B, moved_A, moved_B, probs_A, probs_B)
        )
    return tuple(stages)


def _maps(stage: StageOutput, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Warp, certainty, displacement and anchor probabilities of one pair."""
    certainty = stage.certainty_logit[index, 0].float().sigmoid().cpu()
    displacement = None if stage.displacement is None else _channels_last(stage.displacement[index])
    if stage.anchor_logits is None or stage.anchor_hw is None:
        return _channels_last(stage.warp[index]), certainty, displacement, None
    probs = _channels_last(stage.anchor_logits[index].float().softmax(dim=0))  # [h w a]
    return _channels_last(stage.warp[index]), certainty, displacement, probs.unflatten(-1, stage.anchor_hw)


def _channels_last(values: Float[Tensor, "c h w"]) -> Float[Tensor, "h w c"]:
    return values.float().permute(1, 2, 0).contiguous().cpu()


def _is_blank(image: Float[Tensor, "h w 3"]) -> bool:
    """Whether an image is of one colour, to 8 bits: any place of it looks like any other, and a network guesses."""
    return _is_plain(image[::_STRIDE, ::_STRIDE]) and _is_plain(image)  # mostly a few pixels say no


_STRIDE = 16


def _is_plain(image: Float[Tensor, "h w 3"]) -> bool:
    lowest, highest = image.amin(dim=(0, 1)), image.amax(dim=(0, 1))
    return bool((highest - lowest).max() < 1 / 255)


def _hw(image: Tensor) -> HW:
    return image.shape[0], image.shape[1]
