"""Published checkpoints of the dense matcher: which files, how their images are prepared, how their keys read."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from l2m_viz.data.files import atomic_write
from l2m_viz.encoders.weights import (
    DINOV2_VITL14,
    DINOV2_VITL14_L2MPP,
    VGG19_BN,
    Checkpoint,
    State as State,
    load_strict as load_strict,
    read_state as read_state,
)
from l2m_viz.geometry import HW
from l2m_viz.matching.network import DenseNetwork, VGGDinoEncoder, official_cfg
from l2m_viz.progress import Progress

_ROMA = "https://github.com/Parskatt/storage/releases/download/roma"
_L2MPP = "https://huggingface.co/datasets/Liangyingping/L2Mpp-checkpoints/resolve/main"

# RoMa labels DINOv2's grid of 14 px "16".
_OFFICIAL_STRIDE = {"14": "16"}
_VIT = "encoder.vit."


@dataclass(frozen=True)
class MatcherCheckpoint:
    """Weights of a dense matcher, with what must be known to use them as their authors do.

    Attributes:
        decoder: Everything but the transformer: VGG, coarse stage, refiners.
        backbone: The DINOv2 that the coarse stage was trained on.
        imagenet_normalised: Whether images are normalised with ImageNet's statistics, or left in [0, 1].
        resolution: Size (H, W) of the coarse pass in the authors' benchmarks.
        upsample_resolution: Size (H, W) of the second pass.
    """

    decoder: Checkpoint
    backbone: Checkpoint
    imagenet_normalised: bool
    resolution: HW = (560, 560)
    upsample_resolution: HW = (864, 864)


# Nobody published digests of these of L2M++ and of the indoor RoMa; that of the outdoor one is what projects that pin
# it agree on. The released code of L2M++ feeds images in [0, 1], and its second version is a Lightning checkpoint.
CHECKPOINTS: dict[str, MatcherCheckpoint] = {
    "l2m++": MatcherCheckpoint(
        Checkpoint("l2m++", "l2m++_560x560.pth", f"{_L2MPP}/l2m%2B%2B_560x560.pth"),
        DINOV2_VITL14_L2MPP,
        imagenet_normalised=False,
    ),
    "l2m++-v2": MatcherCheckpoint(
        Checkpoint("l2m++-v2", "l2m++_560x560v2.pth.ckpt", f"{_L2MPP}/l2m%2B%2B_560x560v2.pth.ckpt"),
        DINOV2_VITL14_L2MPP,
        imagenet_normalised=False,
    ),
    "roma-outdoor": MatcherCheckpoint(
        Checkpoint(
            "roma-outdoor",
            "roma_outdoor.pth",
            f"{_ROMA}/roma_outdoor.pth",
            sha256="c7a45c80d41ad788a63c641d1b686d7cb3f297f40097c6f4e75039889e5cc8ba",
            licence="MIT",
        ),
        DINOV2_VITL14,
        imagenet_normalised=True,
    ),
    "roma-indoor": MatcherCheckpoint(
        Checkpoint("roma-indoor", "roma_indoor.pth", f"{_ROMA}/roma_indoor.pth", licence="MIT"),
        DINOV2_VITL14,
        imagenet_normalised=True,
    ),
}


def official_key(key: str) -> str:
    """Name that RoMa and L2M++ give to a parameter of `DenseNetwork`; DINOv2's, in a file of their own, keep theirs.

    >>> official_key("refiners.14.blocks.3.0.weight")
    'decoder.conv_refiner.16.hidden_blocks.2.0.weight'
    """
    part, _, rest = key.partition(".")
    if part == "coarse":
        return "decoder." + rest.replace("decoder.", "embedding_decoder.", 1).replace("gp.", "gps.16.", 1)
    if part not in {"projections", "refiners"}:
        return key
    stride, _, rest = rest.partition(".")
    stride = _OFFICIAL_STRIDE.get(stride, stride)
    if part == "projections":
        return f"decoder.proj.{stride}.{rest}"
    rest = re.sub(r"^blocks\.0\.", "block1.", rest)
    rest = re.sub(r"^blocks\.(\d+)", lambda found: f"hidden_blocks.{int(found[1]) - 1}", rest)
    rest = rest.replace("head.", "out_conv.").replace("displacement.", "disp_emb.")
    return f"decoder.conv_refiner.{stride}.{rest}"


def load_official(network: DenseNetwork, state: State, backbone: State, name: str) -> DenseNetwork:
    """Load a published matcher and its DINOv2 into a network of their kind, all of both files.

    Raises:
        FileFormatError: parameters are missing, unexpected, or of another shape; names them as the files do.
    """
    if not isinstance(network.encoder, VGGDinoEncoder):
        raise TypeError("published weights of RoMa and L2M++ are for VGG19 and DINOv2")
    vit = load_strict(network.encoder.vit, backbone, f"the DINOv2 of {name}")
    own = {f"{_VIT}{key}": tensor for key, tensor in vit.state_dict().items()}
    return load_strict(network, state | own, name, official_key)


def load_published(
    name: str,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    progress: Progress | None = None,
) -> DenseNetwork:
    """Make the network of full size with the checkpoint ``name``, from files of one's own where given.

    Raises:
        MissingError: a file is not here and cannot be fetched.
        FileFormatError: a file is damaged, has another hash, or belongs to another network.
    """
    checkpoint = CHECKPOINTS[name]
    with torch.device("meta"):  # 400 million random numbers would be made for nothing
        network = DenseNetwork(official_cfg())
    state = checkpoint.decoder.read(weights, progress)
    backbone = checkpoint.backbone.read(backbone_weights, progress)
    return load_official(network, state, backbone, name).eval()


def published_encoder(dinov2_weights: str | Path | None = None) -> State:
    """VGG19 and DINOv2 as the encoder of the full-size network, to begin a training from.

    Args:
        dinov2_weights: A DINOv2 of one's own, such as stage 1's; None takes the published one.

    Raises:
        MissingError: a file is not here and cannot be fetched.
        FileFormatError: a file is damaged, or has another hash.
    """
    parts = {"cnn": VGG19_BN.read(), "vit": DINOV2_VITL14.read(dinov2_weights)}
    return {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}


def save_official(path: Path, state: State) -> None:
    """Write a full-size network's own training as the official files are: RoMa's names, without DINOv2.

    ``load_matcher("roma-outdoor", weights=path, backbone_weights=...)`` reads it.
    """
    from safetensors.torch import save

    own = {official_key(key): value for key, value in state.items() if not key.startswith(_VIT)}
    with atomic_write(path) as file:
        file.write(save({key: value.detach().cpu().contiguous() for key, value in own.items()}))
