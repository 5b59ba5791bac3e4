"""Files of our own weights: those inside the package, how they are written, and how they are read.

Weights are in half precision. The 3x3 convolutions of an encoder may be in 8 bits: an integer q a weight and a scale s
in half precision an output channel stand for q s, which is off by at most s / 2.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from l2m_viz.data.files import atomic_write
from l2m_viz.errors import FileFormatError

_FOLDER = Path(__file__).parents[1] / "weights"
_LARGEST = 127  # the integers are -127 to 127: symmetric, so that 0 stays 0
_SCALE = ":scale"  # no part of a module's name can end so


@dataclass(frozen=True)
class Shipped:
    """A file of weights inside the package."""

    path: Path

    @classmethod
    def named(cls, file: str) -> "Shipped":
        """The one of this name."""
        return cls(_FOLDER / file)

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


def save_weights(
    path: Path, state: dict[str, Tensor], meta: dict[str, str], *, eight_bit: bool = False
) -> None:
    """Write weights in half precision, atomically.

    Statistics of batch norms and counters keep their type: a variance may be beyond half precision's range.

    Args:
        path: A .safetensors file.
        state: The weights.
        meta: Says where they come from.
        eight_bit: Write 3x3 convolutions in 8 bits. What was read from such a file is written as it was.
    """
    from safetensors.torch import save

    stored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        value = tensor.detach().cpu().contiguous()
        if eight_bit and value.is_floating_point() and value.shape[2:] == (3, 3):
            stored[key], stored[key + _SCALE] = quantise(value.float())
        else:
            stored[key] = value.to(torch.float16 if _shrinks(key, value) else value.dtype)
    with atomic_write(path) as file:
        file.write(save(stored, {"l2m_viz": json.dumps(meta)}))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_weights` wrote, in single precision, and its meta data.

    Raises:
        FileFormatError: the file is absent, damaged, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("l2m_viz", "{}"))
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        ships = Path(path).resolve().parent == _FOLDER.resolve()
        todo = "it ships with the package: install it again" if ships else "check the path"
        raise FileFormatError(f"no such file {path}", todo=todo) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"cannot read {path}", expected="safetensors", got=str(error)) from error
    return _decoded(stored, path), meta


def quantise(
    weight: Float[Tensor, "c_out c_in kh kw"],
) -> tuple[Int8[Tensor, "c_out c_in kh kw"], Float16[Tensor, " c_out"]]:
    """Integers and one scale an output channel whose products are the weights to within half a scale.

    The scale is the largest magnitude over 127, rounded up in half precision: then no integer is cut off.
    """
    wanted = weight.abs().amax(dim=(1, 2, 3)) / _LARGEST
    scale = wanted.half()
    # positive halves are ordered as the integers with the same bits
    scale = (scale.view(torch.int16) + (scale.float() < wanted)).to(torch.int16).view(torch.float16)
    divisor = torch.where(scale > 0, scale, 1).float()  # a channel of zeros has scale 0
    return (weight / divisor[:, None, None, None]).round().to(torch.int8), scale


def _decoded(stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    state = {}
    for key, value in stored.items():
        if key.endswith(_SCALE):
            continue
        state[key] = value.float() if value.dtype == torch.float16 else value
        if value.dtype == torch.int8:
            scale = stored.get(key + _SCALE)
            if scale is None or scale.shape != value.shape[:1]:
                got = "none" if scale is None else str(tuple(scale.shape))
                raise FileFormatError(f"{path}: {key}", expected=f"a scale for each of {len(value)}", got=got)
            state[key] = value.float() * scale.float()[(..., *[None] * (value.ndim - 1))]
    return state


def _shrinks(key: str, value: Tensor) -> bool:
    return value.is_floating_point() and "running_" not in key
