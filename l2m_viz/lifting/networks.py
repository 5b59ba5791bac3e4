"""Networks of others: where their files lie, how they are loaded, what to do when they are not here.

Nothing is downloaded by itself. The files of a network are looked for in two places:

1. ``$L2M_MODELS/<name>/``, if the environment variable ``L2M_MODELS`` is set and that folder exists: for machines
   without a connection, and for weights of one's own in the same format;
2. the cache of huggingface_hub (``~/.cache/huggingface`` unless ``HF_HOME`` says otherwise), which `hf download` fills.

If they are in neither, the error names the command that fetches them. Weights are read from safetensors and ONNX only,
neither of which can run code; a checkpoint that lacks a parameter is refused, not filled with random numbers.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from l2m_viz.errors import FileFormatError, L2MError, MissingError
from l2m_viz.geometry import HW

MODELS_VARIABLE = "L2M_MODELS"
INSTALL = "run `pip install 'l2m-viz[models]'`"

_MAX_ASPECT = (
    4.0  # a longer picture is shrunk to the area of this one: attention costs the square of the area
)
_LOADING = threading.Lock()  # transformers and diffusers patch torch while they load, in all threads
_Network = TypeVar("_Network")


@dataclass(frozen=True)
class NetworkFiles:
    """One network: its folder's name under ``$L2M_MODELS``, its repositories on huggingface.co, and its files.

    The first repository is the one to fetch from; the others held the same files under older names. A file that ends
    in "/" is a folder with something in it.
    """

    name: str
    repos: tuple[str, ...]
    files: tuple[str, ...]

    def find(self) -> Path:
        """Return the folder that holds all the files.

        Raises:
            MissingError: they are not here, or one of them is not.
        """
        folder = self._own_folder() or self._cached_folder()
        if folder is None:
            what = f"the network {self.name} is not on this machine"
            raise MissingError(what, expected=self._places(), todo=self._advice(None))
        absent = [name for name in self.files if not _is_there(folder / name, name.endswith("/"))]
        if absent:
            what, own = f"{self.name} in {folder} is not complete", folder == self._own_folder()
            expected, got = ", ".join(self.files), f"no {', '.join(absent)}"
            todo = self._advice(folder if own else None)
            raise MissingError(what, expected=expected, got=got, todo=todo)
        return folder

    @contextmanager
    def loading(self, folder: Path) -> Iterator[None]:
        """Turn whatever a library raises about these files into a `FileFormatError` that names them."""
        try:
            yield
        except (L2MError, MemoryError):
            raise
        except ImportError as error:
            raise MissingError(f"{self.name} cannot be loaded", got=_brief(error), todo=INSTALL) from error
        except Exception as error:  # SafetensorError, JSONDecodeError, OSError, RuntimeError, ...
            fetch = self._fetch(folder if folder == self._own_folder() else None)
            todo = (
                f"the files are damaged or another network's; to replace them, remove that folder and {fetch}"
            )
            raise FileFormatError(
                f"cannot load {self.name} from {folder}", got=_brief(error), todo=todo
            ) from error

    def _own_folder(self) -> Path | None:
        root = os.environ.get(MODELS_VARIABLE)
        folder = Path(root).expanduser() / self.name if root else None
        return folder if folder is not None and folder.is_dir() else None

    def _cached_folder(self) -> Path | None:
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return None  # nobody can have filled its cache
        for repo in self.repos:
            path = try_to_load_from_cache(repo, self.files[0])
            if isinstance(path, str):
                return Path(path).parents[self.files[0].count("/")]
        return None

    def _places(self) -> str:
        root = os.environ.get(MODELS_VARIABLE, f"${MODELS_VARIABLE}")
        return f"{', '.join(self.files)} in {root}/{self.name} or in the cache of huggingface_hub"

    def _fetch(self, into: Path | None = None) -> str:
        local = f" --local-dir {into}" if into is not None else ""
        return f"run `hf download {self.repos[0]} {' '.join(self.files)}{local}`"

    def _advice(self, into: Path | None) -> str:
        elsewhere = (
            f"; or copy the folder to $L2M_MODELS/{self.name} and set {MODELS_VARIABLE}"
            if into is None
            else ""
        )
        return f"{self._fetch(into)} with a connection{elsewhere}"


def load_once(load: Callable[[NetworkFiles, Path], _Network]) -> Callable[[NetworkFiles, Path], _Network]:
    """Keep the last network that ``load`` gave for the life of the process, and load one at a time."""
    cached = lru_cache(maxsize=1)(load)

    @wraps(load)
    def locked(network: NetworkFiles, folder: Path) -> _Network:
        with _LOADING, network.loading(folder):
            return cached(network, folder)

    return locked


def load_complete(kind: Any, folder: Path, **options: object) -> Any:  # noqa: ANN401 - a class of transformers or diffusers
    """Read one model from a folder and refuse a file that lacks parameters, which the libraries would make up.

    Raises:
        FileFormatError: parameters are missing or of another shape.
    """
    model, report = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
    )
    # the mask token is for training only, and some conversions left it out
    absent = [name for name in report["missing_keys"] if not name.endswith("mask_token")]
    if absent or report["mismatched_keys"]:
        got = f"{len(absent)} parameters missing, {len(report['mismatched_keys'])} of another shape"
        todo = "the weights are another network's; fetch them again"
        raise FileFormatError(
            f"the weights in {folder}", expected=f"those of {kind.__name__}", got=got, todo=todo
        )
    return model.eval()


def network_device() -> torch.device:
    """The GPU if torch sees one, else the CPU; images come and go on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network_hw(hw: HW, short_side: int, multiple: int) -> HW:
    """Size for a network that wants this short side and multiples of ``multiple``; the aspect stays, but for rounding.

    >>> network_hw((320, 480), 518, 14)
    (518, 784)
    """
    scale = min(short_side / min(hw), short_side * math.sqrt(_MAX_ASPECT / (hw[0] * hw[1])))
    height, width = (max(1, round(side * scale / multiple)) * multiple for side in hw)
    # a strip so narrow that its short side was rounded up to ``multiple`` is squeezed along the other one
    longest = int(_MAX_ASPECT * short_side**2 / min(height, width)) // multiple * multiple
    return min(height, longest), min(width, longest)


def _is_there(path: Path, is_folder: bool) -> bool:
    return path.is_dir() and any(path.iterdir()) if is_folder else path.is_file()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"
