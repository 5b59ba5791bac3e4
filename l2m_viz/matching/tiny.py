"""l2m-tiny: the small network that ships with the package, and its file."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from l2m_viz.encoders.conv_pyramid import TINY_PYRAMID, ConvPyramidCfg
from l2m_viz.encoders.shipped import (
    Shipped as Shipped,
    read_weights as read_weights,
    save_weights as save_weights,
)
from l2m_viz.encoders.weights import load_strict, resolve_device
from l2m_viz.geometry import HW
from l2m_viz.matching.attention import AttentionCoarseCfg
from l2m_viz.matching.matcher import Precision, fastest_precision
from l2m_viz.matching.network import DenseNetwork, NetworkCfg
from l2m_viz.matching.propagation import PropagationCfg
from l2m_viz.matching.refiner import RefinerCfg

if TYPE_CHECKING:
    from l2m_viz.matching.dense import DenseMatcher

SHIPPED = Shipped.named("l2m-tiny.safetensors")
# Shorter sides in pixels of the two passes; the aspect is the image's own.
TINY_RESOLUTION: HW = (320, 320)
TINY_UPSAMPLE_RESOLUTION: HW | None = (512, 512)


def tiny_cfg() -> NetworkCfg:
    """The network of l2m-tiny: 5 million parameters, a convolutional pyramid and attention at stride 16."""
    return NetworkCfg(
        encoder=TINY_PYRAMID,
        coarse=AttentionCoarseCfg(),
        refiners=(
            RefinerCfg(stride=8, displacement_dim=16, radius=4, hidden=96, blocks=4, iterations=2),
            RefinerCfg(stride=4, displacement_dim=16, radius=2, hidden=64, blocks=3),
            RefinerCfg(stride=2, displacement_dim=8, hidden=40, blocks=2, propagation=PropagationCfg()),
        ),
        projections=((8, 64), (4, 32), (2, 16)),
    )


def base_cfg() -> NetworkCfg:
    """A wider network of the same kind, 34 million parameters; to be trained on a GPU, none is shipped."""
    return NetworkCfg(
        encoder=ConvPyramidCfg(widths=(64, 96, 192, 384), blocks=(1, 2, 3, 4)),
        coarse=AttentionCoarseCfg(dim=384, layers=8, heads=8),
        refiners=(
            RefinerCfg(stride=8, displacement_dim=32, radius=4, hidden=256, blocks=6, iterations=2),
            RefinerCfg(stride=4, displacement_dim=32, radius=2, hidden=128, blocks=6),
            RefinerCfg(stride=2, displacement_dim=16, hidden=64, blocks=4, propagation=PropagationCfg()),
        ),
        projections=((8, 128), (4, 64), (2, 32)),
    )


_CFGS = {"l2m-tiny": tiny_cfg, "l2m-base": base_cfg}


def load_tiny(weights: str | Path | None = None) -> DenseNetwork:
    """Build l2m-tiny, or the one of its family that a file of weights says it is of; None takes the shipped file.

    Raises:
        FileFormatError: the file is absent, damaged, or another network's.
    """
    path = SHIPPED.path if weights is None else Path(weights)
    state, meta = read_weights(path)
    with torch.device("meta"):
        network = DenseNetwork(_CFGS.get(meta.get("name", ""), tiny_cfg)())
    return load_strict(network, state, str(path.name))


def tiny_dense_matcher(
    network: DenseNetwork,
    device: torch.device | str = "auto",
    *,
    resolution: HW | None = None,
    upsample_resolution: HW | None = None,
    precision: Precision | None = None,
) -> "DenseMatcher":
    """The network as a matcher, with l2m-tiny's settings where nothing else is said."""
    from l2m_viz.matching.dense import DenseMatcher

    device = resolve_device(device)
    cfg = DenseMatcher.Cfg(
        resolution=resolution or TINY_RESOLUTION,
        upsample_resolution=upsample_resolution or TINY_UPSAMPLE_RESOLUTION,
        keep_aspect=resolution is None and upsample_resolution is None,
        attenuate=False,
        precision=precision or fastest_precision(device),
    )
    return DenseMatcher("l2m-tiny", network, cfg, device)
