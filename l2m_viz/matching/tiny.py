"""l2m-tiny: the small network that ships with the package, and its file."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from l2m_viz.data.files import atomic_write
from l2m_viz.encoders.conv_pyramid import ConvPyramidCfg
from l2m_viz.encoders.weights import load_strict
from l2m_viz.errors import FileFormatError
from l2m_viz.geometry import HW
from l2m_viz.matching.attention import AttentionCoarseCfg
from l2m_viz.matching.matcher import Precision
from l2m_viz.matching.network import DenseNetwork, NetworkCfg
from l2m_viz.matching.refiner import RefinerCfg


@dataclass(frozen=True)
class Shipped:
    """A file of weights inside the package."""

    path: Path

    @property
    def file(self) -> str:
        """Its name."""
        return self.path.name

    def find(self) -> Path | None:
        """Its path if it is there."""
        return self.path if self.path.is_file() else None

    def where(self) -> str:
        """Where it belongs."""
        return f"{self.path}, which this copy of the package lacks; install it again"


SHIPPED = Shipped(Path(__file__).parents[1] / "weights" / "l2m-tiny.safetensors")
# Shorter sides in pixels of the two passes; the aspect is the image's own.
TINY_RESOLUTION: HW = (384, 384)
TINY_UPSAMPLE_RESOLUTION: HW | None = (480, 480)


def tiny_cfg() -> NetworkCfg:
    """The network of l2m-tiny: 5 million parameters, a convolutional pyramid and attention at stride 16."""
    return NetworkCfg(
        encoder=ConvPyramidCfg(widths=(32, 48, 96, 192), blocks=(0, 1, 1, 3)),
        coarse=AttentionCoarseCfg(),
        refiners=(
            RefinerCfg(stride=8, displacement_dim=16, radius=4, hidden=96, blocks=4),
            RefinerCfg(stride=4, displacement_dim=16, radius=2, hidden=64, blocks=3),
            RefinerCfg(stride=2, displacement_dim=8, hidden=40, blocks=2),
        ),
        projections=((8, 64), (4, 32), (2, 16)),
    )


def load_tiny(weights: str | Path | None = None) -> DenseNetwork:
    """Build l2m-tiny from a file of weights; None takes the shipped ones.

    Raises:
        FileFormatError: the file is absent, damaged, or another network's.
    """
    path = Path(weights or SHIPPED.path)
    with torch.device("meta"):
        network = DenseNetwork(tiny_cfg())
    return load_strict(network, read_weights(path)[0], str(path.name))


def fastest_precision(device: torch.device) -> Precision:
    """Bfloat16 where the processor multiplies it in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "float32"


def save_weights(path: Path, state: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write weights in half precision, atomically; ``meta`` says where they come from.

    Statistics of batch norms and counters keep their type: a variance may be beyond half precision's range.
    """
    from safetensors.torch import save

    half = {
        key: value.detach().cpu().contiguous().to(torch.float16 if _shrinks(key, value) else value.dtype)
        for key, value in state.items()
    }
    with atomic_write(path) as file:
        file.write(save(half, {"l2m_viz": json.dumps(meta)}))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_weights` wrote, in single precision, and its meta data.

    Raises:
        FileFormatError: the file is absent, damaged, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("l2m_viz", "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise FileFormatError(f"no such file {path}", todo="install the package again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"cannot read {path}", expected="safetensors", got=str(error)) from error
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()}, meta


def _shrinks(key: str, value: Tensor) -> bool:
    return value.is_floating_point() and "running_" not in key
