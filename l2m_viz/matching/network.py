"""The matching network: an encoder, a coarse stage, and refiners from coarse to fine; one family from tiny to official.

Channels first; warps are (x, y) in normalised coordinates of the other image. Both directions are always computed; for
images of one size they run stacked in one batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.constants import constant
from l2m_viz.encoders.conv_pyramid import ConvPyramid, ConvPyramidCfg
from l2m_viz.encoders.dinov2 import DinoCfg, DinoViT
from l2m_viz.encoders.folding import conv_norm
from l2m_viz.encoders.vgg import VGG19Cfg, VGG19Pyramid
from l2m_viz.geometry import HW
from l2m_viz.matching.attention import AttentionCoarse, AttentionCoarseCfg
from l2m_viz.matching.gp import GPCoarse, GPCoarseCfg
from l2m_viz.matching.propagation import propagate
from l2m_viz.matching.refiner import Refiner, RefinerCfg
from l2m_viz.matching.stages import StageOutput

Pyramid = dict[int, Tensor]  # feature maps (B, C, h, w) by stride

_REACH_SCALE = 4  # RoMa: an output of 1 moves the warp by reach / (4 W) normalised, which is reach / 8 px


@dataclass(frozen=True)
class VGGDinoCfg:
    """RoMa's encoder: VGG19 for fine features, DINOv2 for coarse ones."""

    vgg: VGG19Cfg = field(default_factory=VGG19Cfg)
    dino: DinoCfg = field(default_factory=DinoCfg)


@dataclass(frozen=True)
class NetworkCfg:
    """The parts of a matching network.

    Attributes:
        encoder: What makes the feature maps.
        coarse: What finds the first warp.
        refiners: From coarse to fine.
        projections: (stride, channels) of the maps that a 1x1 convolution and a batch norm narrow first.
    """

    encoder: VGGDinoCfg | ConvPyramidCfg
    coarse: GPCoarseCfg | AttentionCoarseCfg
    refiners: tuple[RefinerCfg, ...]
    projections: tuple[tuple[int, int], ...] = ()


def official_cfg() -> NetworkCfg:
    """The network of RoMa and L2M++, full size."""
    return NetworkCfg(
        encoder=VGGDinoCfg(),
        coarse=GPCoarseCfg(wrap=True),
        refiners=(
            RefinerCfg(stride=14, displacement_dim=128, radius=7, reach=16),
            RefinerCfg(stride=8, displacement_dim=64, radius=3),
            RefinerCfg(stride=4, displacement_dim=32, radius=2),
            RefinerCfg(stride=2, displacement_dim=16),
            RefinerCfg(stride=1, displacement_dim=6),
        ),
        projections=((14, 512), (8, 512), (4, 256), (2, 64), (1, 9)),
    )


class DenseNetwork(nn.Module):
    """Encoder, coarse stage and refiners."""

    def __init__(self, cfg: NetworkCfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = _build_encoder(cfg.encoder)
        widths = dict(self.encoder.channels)
        self.projections = nn.ModuleDict()
        for stride, width in cfg.projections:
            self.projections[str(stride)] = nn.Sequential(
                nn.Conv2d(widths[stride], width, 1), nn.BatchNorm2d(width)
            )
            widths[stride] = width
        self.coarse = _build_coarse(cfg.coarse, widths)
        self.refiners = nn.ModuleDict(
            {str(refiner.stride): Refiner(refiner, widths[refiner.stride]) for refiner in cfg.refiners}
        )

    def encode(self, images: Float[Tensor, "b 3 h w"], *, coarse: bool = True) -> Pyramid:
        """Feature maps by stride, before the projections; the coarse stage's own only if asked for."""
        if isinstance(self.encoder, VGGDinoEncoder):
            return self.encoder(images, coarse=coarse)
        return self.encoder(images)

    def forward(
        self,
        image_A: Float[Tensor, "b 3 h w"],
        image_B: Float[Tensor, "b 3 h2 w2"],
        refined: int | None = None,
    ) -> tuple[list[StageOutput], list[StageOutput]]:
        """Match both ways: A to B and B to A, the coarse stage first, then the refiners in order.

        Args:
            image_A: Images A.
            image_B: Images B.
            refined: The refiners see only so many pairs, the first ones; None: all.
        """
        features_A, features_B = self._encode_pair(image_A, image_B, coarse=True)
        start = self.coarse(features_A, features_B)
        if refined is not None and refined < len(image_A):
            features_A, features_B = (
                {stride: features[:refined] for stride, features in pyramid.items()}
                for pyramid in (features_A, features_B)
            )
            start_of_refined = (start[0].first(refined), start[1].first(refined))
        else:
            start_of_refined = start
        strides = [refiner.stride for refiner in self.cfg.refiners]
        there, back = self._refine_pair(
            features_A, features_B, start_of_refined, (_hw(image_A), _hw(image_B)), strides, 1.0
        )
        return [start[0], *there], [start[1], *back]

    def upsample(
        self,
        image_A: Float[Tensor, "b 3 h w"],
        image_B: Float[Tensor, "b 3 h2 w2"],
        start: tuple[StageOutput, StageOutput],
        scale_factor: float,
    ) -> tuple[list[StageOutput], list[StageOutput]]:
        """Refine the results of a pass on smaller images on larger ones, without the coarse stage.

        Args:
            image_A: The larger image.
            image_B: The larger image.
            start: Last stages of the pass on the smaller ones.
            scale_factor: Square root of the ratio of the areas.
        """
        features_A, features_B = self._encode_pair(image_A, image_B, coarse=False)
        strides = [refiner.stride for refiner in self.cfg.refiners if refiner.stride < self.cfg.coarse.stride]
        sizes = (_hw(image_A), _hw(image_B))
        return self._refine_pair(
            features_A, features_B, start, sizes, strides, scale_factor, second_pass=True
        )

    def refine(
        self,
        features_A: Pyramid,
        features_B: Pyramid,
        warp: Float[Tensor, "b 2 h w"],
        certainty_logit: Float[Tensor, "b 1 h w"],
        hw_B: HW,
        *,
        strides: list[int],
        scale_factor: float = 1.0,
        second_pass: bool = False,
    ) -> list[StageOutput]:
        """Refine one direction's warp at these strides; gradients are cut between the stages, as in RoMa.

        Every iteration of a refiner is a stage.

        Args:
            features_A: Projected features.
            features_B: Projected features.
            warp: Where to start, at any resolution.
            certainty_logit: Where to start, at any resolution.
            hw_B: Size of the network's input B in pixels, the unit of what the refiners say.
            strides: Which refiners run, in order.
            scale_factor: See `Refiner.forward`.
            second_pass: Whether the warp may be propagated, see `RefinerCfg.propagation`.
        """
        stages: list[StageOutput] = []
        for refiner in self._runs(strides):
            stride = refiner.cfg.stride
            size = features_A[stride].shape[-2:]
            warp, certainty_logit = _resize(warp.detach(), size), _resize(certainty_logit.detach(), size)
            before = warp
            if second_pass and refiner.cfg.propagation is not None:
                maps = features_A[stride], features_B[stride]
                warp = propagate(*maps, warp, certainty_logit, refiner.cfg.propagation)
            delta, delta_logit = refiner(features_A[stride], features_B[stride], warp, scale_factor)
            warp = warp + delta * _unit(refiner.cfg, hw_B, delta)
            certainty_logit, displacement = certainty_logit + delta_logit, warp - before
            stages.append(StageOutput(stride, warp, certainty_logit, displacement))
        return stages

    def _runs(self, strides: list[int]) -> Iterator[Refiner]:
        """The refiners of these strides, each once for every iteration."""
        for stride in strides:
            refiner: Refiner = self.refiners[str(stride)]  # pyright: ignore[reportAssignmentType]
            yield from repeat(refiner, refiner.cfg.iterations)

    def _encode_pair(
        self, image_A: Float[Tensor, "b 3 h w"], image_B: Float[Tensor, "b 3 h2 w2"], *, coarse: bool
    ) -> tuple[Pyramid, Pyramid]:
        """Projected features of both images."""
        # On a CPU a larger batch is no quicker, and the fine maps of two are the peak of a match's memory.
        alone = image_A.device.type == "cpu" and not torch.is_grad_enabled()
        if alone or _hw(image_A) != _hw(image_B):
            return self._project(self.encode(image_A, coarse=coarse)), self._project(
                self.encode(image_B, coarse=coarse)
            )
        both = self._project(self.encode(torch.cat([image_A, image_B]), coarse=coarse))
        halves = {stride: features.chunk(2) for stride, features in both.items()}
        return (
            {stride: a for stride, (a, _) in halves.items()},
            {stride: b for stride, (_, b) in halves.items()},
        )

    def _project(self, features: Pyramid) -> Pyramid:
        used = {self.cfg.coarse.stride, *(refiner.stride for refiner in self.cfg.refiners)}
        return {
            stride: self._project_map(stride, map_) for stride, map_ in features.items() if stride in used
        }

    def _project_map(self, stride: int, features: Tensor) -> Tensor:
        if str(stride) not in self.projections:
            return features
        conv, norm = self.projections[str(stride)]  # pyright: ignore[reportGeneralTypeIssues]
        return conv_norm(features, conv, norm)

    def _refine_pair(
        self,
        features_A: Pyramid,
        features_B: Pyramid,
        start: tuple[StageOutput, StageOutput],
        sizes: tuple[HW, HW],
        strides: list[int],
        scale_factor: float,
        second_pass: bool = False,
    ) -> tuple[list[StageOutput], list[StageOutput]]:
        """Both directions, stacked in one batch if the images have one size."""
        (there, back), (hw_A, hw_B) = start, sizes
        if hw_A != hw_B:
            return (
                self.refine(
                    features_A, features_B, there.warp, there.certainty_logit, hw_B,
                    strides=strides, scale_factor=scale_factor, second_pass=second_pass,
                ),
                self.refine(
                    features_B, features_A, back.warp, back.certainty_logit, hw_A,
                    strides=strides, scale_factor=scale_factor, second_pass=second_pass,
                ),
            )  # fmt: skip
        stages: list[StageOutput] = []
        warp = torch.cat([there.warp, back.warp])
        logit = torch.cat([there.certainty_logit, back.certainty_logit])
        for stride in strides:  # one at a time, so that no more than one level of both is in memory twice
            stacked = {stride: torch.cat([features_A[stride], features_B[stride]])}
            swapped = {stride: torch.cat([features_B[stride], features_A[stride]])}
            stages += self.refine(
                stacked, swapped, warp, logit, hw_B,
                strides=[stride], scale_factor=scale_factor, second_pass=second_pass,
            )  # fmt: skip
            warp, logit = stages[-1].warp, stages[-1].certainty_logit
        halves = [_split(stage) for stage in stages]
        return [a for a, _ in halves], [b for _, b in halves]


class VGGDinoEncoder(nn.Module):
    """VGG19's maps at strides 1, 2, 4, 8 and DINOv2's at 14."""

    def __init__(self, cfg: VGGDinoCfg) -> None:
        super().__init__()
        self.cnn = VGG19Pyramid(cfg.vgg)
        self.vit = DinoViT(cfg.dino)
        self.channels = self.cnn.channels | {cfg.dino.patch_size: cfg.dino.dim}

    def forward(self, images: Float[Tensor, "b 3 h w"], *, coarse: bool = True) -> Pyramid:
        """Feature maps by stride; without the transformer's, which only the coarse pass needs, if not ``coarse``."""
        pyramid = self.cnn(images)
        return pyramid | {self.vit.cfg.patch_size: self.vit(images)} if coarse else pyramid


def _build_encoder(cfg: VGGDinoCfg | ConvPyramidCfg) -> VGGDinoEncoder | ConvPyramid:
    return VGGDinoEncoder(cfg) if isinstance(cfg, VGGDinoCfg) else ConvPyramid(cfg)


def _build_coarse(
    cfg: GPCoarseCfg | AttentionCoarseCfg, widths: dict[int, int]
) -> GPCoarse | AttentionCoarse:
    build = GPCoarse if isinstance(cfg, GPCoarseCfg) else AttentionCoarse
    return build(cfg, widths[cfg.stride])  # pyright: ignore[reportArgumentType]


def _unit(cfg: RefinerCfg, hw_B: HW, like: Tensor) -> Float[Tensor, "2 1 1"]:
    """Normalised (x, y) that an output of 1 moves the warp by."""
    reach = (cfg.reach or cfg.stride) / _REACH_SCALE
    return constant((reach / hw_B[1], reach / hw_B[0]), like.device, like.dtype)[:, None, None]


def _resize(values: Float[Tensor, "b c h w"], size: torch.Size) -> Float[Tensor, "b c h2 w2"]:
    if values.shape[-2:] == size:
        return values
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)


def _split(stage: StageOutput) -> tuple[StageOutput, StageOutput]:
    """A stage of stacked directions as a stage of each."""
    warps, logits = stage.warp.chunk(2), stage.certainty_logit.chunk(2)
    displacements = (None, None) if stage.displacement is None else stage.displacement.chunk(2)
    a, b = (StageOutput(stage.stride, *parts) for parts in zip(warps, logits, displacements, strict=True))
    return a, b


def _hw(images: Tensor) -> HW:
    return images.shape[-2], images.shape[-1]
