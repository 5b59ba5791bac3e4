"""A small convolutional pyramid: the encoder of l2m-tiny."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_viz.encoders.folding import conv_norm
from l2m_viz.encoders.imagenet import normalize_imagenet
from l2m_viz.encoders.shipped import read_weights
from l2m_viz.encoders.weights import State, load_strict


@dataclass(frozen=True)
class ConvPyramidCfg:
    """Widths and depths, from fine to coarse."""

    strides: tuple[int, ...] = (2, 4, 8, 16)
    widths: tuple[int, ...] = (32, 64, 128, 192)
    blocks: tuple[int, ...] = (1, 2, 2, 3)


TINY_PYRAMID = ConvPyramidCfg(widths=(32, 48, 96, 192), blocks=(0, 1, 1, 3))
"""That of l2m-tiny: 2.6 million parameters."""


class ConvPyramid(nn.Module):
    """Residual blocks (He et al., CVPR 2016) at falling resolution, then one way back up to stride 8.

    The coarsest map sees most of a small photo; added to the next finer one (feature pyramid, Lin et al., CVPR 2017) it
    tells look-alike corners of different things apart.
    """

    def __init__(self, cfg: ConvPyramidCfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.strides = cfg.strides
        self.channels = dict(zip(cfg.strides, cfg.widths, strict=True))
        widths_in = (3, *cfg.widths[:-1])
        self.levels = nn.ModuleList(
            nn.Sequential(
                _ConvNorm(width_in, width, 5 if width_in == 3 else 3, stride=2),
                nn.ReLU(inplace=True),
                *(ResidualBlock(width) for _ in range(blocks)),
            )
            for width_in, width, blocks in zip(widths_in, cfg.widths, cfg.blocks, strict=True)
        )
        self.lateral = nn.Conv2d(cfg.widths[-1], cfg.widths[-2], 1)
        self.merge = ResidualBlock(cfg.widths[-2])

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[int, Float[Tensor, "b c h2 w2"]]:
        """Feature maps by stride; sides of the images are multiples of the largest stride."""
        x = normalize_imagenet(images).contiguous(memory_format=torch.channels_last)
        maps: dict[int, Tensor] = {}
        for stride, level in zip(self.strides, self.levels, strict=True):
            x = level(x)
            maps[stride] = x
        coarse, finer = self.strides[-1], self.strides[-2]
        above = F.interpolate(self.lateral(maps[coarse]), size=maps[finer].shape[-2:], mode="nearest")
        maps[finer] = self.merge(maps[finer] + above)
        return maps


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _ConvNorm(width, width, 3, relu=True)
        self.second = _ConvNorm(width, width, 3)
        # starts as the identity, so that depth costs no trainability
        nn.init.zeros_(self.second[1].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape."""
        return F.relu(x + self.second(self.first(x)))


class _ConvNorm(nn.Sequential):
    """Convolution and batch norm; in evaluation one convolution."""

    def __init__(
        self, width_in: int, width_out: int, kernel: int, stride: int = 1, *, relu: bool = False
    ) -> None:
        conv = nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(width_out))
        self.relu = relu

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        conv, norm = self
        return conv_norm(input, conv, norm, relu=self.relu)  # pyright: ignore[reportArgumentType]


def load_pyramid(path: str | Path, cfg: ConvPyramidCfg = TINY_PYRAMID) -> ConvPyramid:
    """Build a pyramid, in evaluation mode, from a file that stage 1 wrote.

    Raises:
        FileFormatError: the file is absent, damaged, or another network's.
    """
    with torch.device("meta"):
        pyramid = ConvPyramid(cfg)
    return load_strict(pyramid, read_weights(Path(path))[0], Path(path).name).eval()


def load_encoder_state(path: str | Path, cfg: ConvPyramidCfg = TINY_PYRAMID) -> State:
    """The weights of `load_pyramid` by their names in a `ConvPyramid`: where stage 2 may start its encoder.

    Raises:
        FileFormatError: the file is absent, damaged, or another network's.
    """
    return load_pyramid(path, cfg).state_dict()
