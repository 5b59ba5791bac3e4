"""Checkpoints: where their files are, how they come here, and how they enter a network, whole or not at all.

A file is looked for in three places, in this order:

1. ``$L2M_MODELS/<name>/<file>``, if the environment variable ``L2M_MODELS`` is set;
2. the cache of huggingface_hub, for files that are published there;
3. torch's cache (``~/.cache/torch/hub/checkpoints`` unless ``TORCH_HOME`` says otherwise), where the official code of
   RoMa, L2M++ and kornia puts its downloads.

What is in none of them is fetched to the first place, if ``L2M_MODELS`` is set, else to the third. Files are read with
``weights_only`` or as safetensors, neither of which can run code.
"""

import os
import pickle
import urllib.parse
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from l2m_viz.data.download import check_hash, download
from l2m_viz.errors import FileFormatError, MissingError
from l2m_viz.progress import Progress, percent_bar

State = dict[str, Tensor]
_Net = TypeVar("_Net", bound=nn.Module)

# What training frameworks put before the names of parameters; no network here has a part of these names.
_WRAPPERS = ("module.", "model.", "matcher.", "_orig_mod.")
_CONTAINERS = ("state_dict", "model", "extractor")  # where a checkpoint keeps its weights beside other things
_NAMED_AT_MOST = 8  # parameters of each kind in an error
_VGG_LAYERS = 40  # RoMa's slice of torchvision's VGG19-bn: through the fourth pool


@dataclass(frozen=True)
class Checkpoint:
    """One published file of weights.

    Attributes:
        name: Its folder under ``$L2M_MODELS``.
        file: Its name there.
        url: Where it is published.
        sha256: The hexadecimal digest, or its first digits; empty where nobody published one: then the digest of the
            first download is noted beside the file and holds from there on.
        licence: Of the weights, as far as their authors say.
        aliases: Other names that other programs cache the same file under.
        adapt: Turns what the file holds into the state of our network, where the two differ.
    """

    name: str
    file: str
    url: str
    sha256: str = ""
    licence: str = "not stated"
    aliases: tuple[str, ...] = ()
    adapt: Callable[[State], State] | None = None

    def find(self) -> Path | None:
        """Return the file if it is on this machine; nothing is fetched."""
        return next((path for path in self._places() if path.is_file()), None)

    def fetch(self, progress: Progress | None = None) -> Path:
        """Return the file, checked by its hash; it is downloaded if it is not here.

        Raises:
            MissingError: it is not here and cannot be fetched; names the file and where to put it.
            FileFormatError: it has another hash.
        """
        path = self.find()
        if path is None:
            path = self._target()
            with nullcontext(progress) if progress else percent_bar() as report:
                download(self.url, path, self.sha256, report)
        check_hash(path, self.sha256)
        return path

    def read(self, path: str | Path | None = None, progress: Progress | None = None) -> State:
        """Read the state from a file of one's own, or from the published one, which is fetched if need be.

        Raises:
            MissingError: no such file, or as `fetch`.
            FileFormatError: the file is damaged, foreign, or has another hash.
        """
        state = read_state(self.fetch(progress) if path is None else path)
        return self.adapt(state) if self.adapt is not None else state

    def where(self) -> str:
        """Say what is missing and how to get it, in one line."""
        return f"{self.file} (from {self.url}, to {self._target()})"

    def _target(self) -> Path:
        own = self._own()
        return own if own is not None else _torch_cache() / self.file

    def _places(self) -> Iterable[Path]:
        if (own := self._own()) is not None:
            yield own
        if (cached := self._in_hub_cache()) is not None:
            yield cached
        names = (
            self.file,
            *self.aliases,
            self.url.rpartition("/")[2],
        )  # torch keeps the name as the address spells it
        yield from (_torch_cache() / name for name in names)

    def _own(self) -> Path | None:
        from l2m_viz.lifting.networks import MODELS_VARIABLE

        root = os.environ.get(MODELS_VARIABLE)
        return Path(root).expanduser() / self.name / self.file if root else None

    def _in_hub_cache(self) -> Path | None:
        where = _on_the_hub(self.url)
        if where is None:
            return None
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return None  # nobody can have filled its cache
        repo_type, repo, file = where
        path = try_to_load_from_cache(repo, file, repo_type=repo_type)
        return Path(path) if isinstance(path, str) else None


def read_state(path: str | Path) -> State:
    """Read named tensors from a safetensors file or one of torch's, without the wrappers of training frameworks.

    A Lightning checkpoint's ``state_dict`` is taken out of it, and prefixes such as ``module.`` and
    ``model.`` are taken off.

    Raises:
        MissingError: no such file.
        FileFormatError: it is damaged, holds more than numbers, or no named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingError(f"no such file {path}", expected="a file of weights", todo="check the path")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(t, Tensor) for t in content.values())
    ):
        raise FileFormatError(f"cannot load {path}", expected="named tensors", got=_described(content))
    return _unwrapped(content, path)


def load_strict(
    module: _Net, state: State, name: str, key_in_file: Callable[[str], str] = lambda key: key
) -> _Net:
    """Load ``state`` into ``module``, all of both, in place; a module on the meta device takes over the tensors.

    Args:
        module: The network.
        state: What the file holds.
        name: Of the network, for errors.
        key_in_file: Name in the file of a parameter of the network, where it has another there.

    Raises:
        FileFormatError: parameters are missing, unexpected, or of another shape; names them as the file does.
    """
    wanted = {key_in_file(key): tensor for key, tensor in module.state_dict().items()}
    kinds = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in wanted.items()
            if key in state and state[key].shape != tensor.shape
        ],
    }
    if any(kinds.values()):
        got = "; ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys)
        todo = "the file belongs to another network, or is only part of one"
        raise FileFormatError(
            f"the weights do not fit {name}", expected=f"its {len(wanted)} parameters", got=got, todo=todo
        )
    loaded = {
        key: state[key_in_file(key)].to(dtype=tensor.dtype) for key, tensor in module.state_dict().items()
    }
    module.load_state_dict(loaded, assign=any(tensor.is_meta for tensor in wanted.values()))
    return module


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for: "auto" is the GPU if torch sees one, else the CPU.

    Raises:
        MissingError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "'auto', 'cpu', 'cuda', 'mps', ..."
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        raise MissingError(f"no device '{device}' here", expected=expected, got=_brief(error)) from error
    if found.type == "meta":
        got = "a device of shapes without numbers"
        raise MissingError(f"no device '{device}' here", expected=expected, got=got)
    return found


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> Any:  # noqa: ANN401 - whatever someone saved
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        todo = "whoever trusts its source can take the tensors out and save them as safetensors"
        expected = "tensors only, as code in a file is never run"
        raise FileFormatError(
            f"cannot load {path}", expected=expected, got=_brief(error), todo=todo
        ) from error
    except (
        Exception
    ) as error:  # a damaged archive raises RuntimeError, EOFError, KeyError, UnicodeDecodeError, ...
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    todo = "the file is truncated or foreign; fetch it again"
    return FileFormatError(f"cannot load {path}", expected="weights", got=_brief(error), todo=todo)


def _unwrapped(state: State, path: Path) -> State:
    unwrapped: State = {}
    for key, tensor in state.items():
        short = key
        while prefix := next((wrapper for wrapper in _WRAPPERS if short.startswith(wrapper)), ""):
            short = short.removeprefix(prefix)
        if short in unwrapped:
            todo = "take the wanted one of them out of the file"
            raise FileFormatError(
                f"cannot load {path}", expected="one network", got=f"{short} twice", todo=todo
            )
        unwrapped[short] = tensor
    return unwrapped


def _described(content: Any) -> str:  # noqa: ANN401 - whatever someone saved
    if isinstance(content, dict):
        return f"a dictionary with {_some([str(key) for key in content]) or 'nothing'}"
    return f"a {type(content).__name__}"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED_AT_MOST} more" if len(keys) > _NAMED_AT_MOST else ""
    return ", ".join(keys[:_NAMED_AT_MOST]) + more


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"


def _torch_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _on_the_hub(url: str) -> tuple[str, str, str] | None:
    """Type, name and file of a repository on huggingface.co, from an address of a file in it.

    >>> _on_the_hub("https://huggingface.co/datasets/owner/name/resolve/main/a%2B.pth")
    ('dataset', 'owner/name', 'a+.pth')
    """
    parts = urllib.parse.urlsplit(url)
    if parts.netloc != "huggingface.co":
        return None
    repo, _, file = urllib.parse.unquote(parts.path).strip("/").partition("/resolve/main/")
    kind = "dataset" if repo.startswith("datasets/") else "model"
    return kind, repo.removeprefix("datasets/"), file


def _torchvision_vgg(state: State) -> State:
    """The convolutions of torchvision's VGG19-bn as `VGG19Pyramid` counts them; the classifier is not wanted."""
    layers = {
        key.replace("features.", "layers."): tensor
        for key, tensor in state.items()
        if key.startswith("features.") and int(key.split(".")[1]) < _VGG_LAYERS
    }
    # The file is older than these counters of training steps, which play no part in what a network answers.
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for key in layers
        if key.endswith("running_mean")
    }
    return counters | layers


_META = "https://dl.fbaipublicfiles.com/dinov2"
_L2MPP = "https://huggingface.co/datasets/Liangyingping/L2Mpp-checkpoints/resolve/main"

# The digests are what independent projects that pin the same addresses agree on.
VGG19_BN = Checkpoint(
    "vgg19-bn",
    "vgg19_bn-c79401a0.pth",
    "https://download.pytorch.org/models/vgg19_bn-c79401a0.pth",
    sha256="c79401a0",
    licence="BSD-3-Clause (torchvision)",
    adapt=_torchvision_vgg,
)
DINOV2_VITS14 = Checkpoint(
    "dinov2-vits14",
    "dinov2_vits14_pretrain.pth",
    f"{_META}/dinov2_vits14/dinov2_vits14_pretrain.pth",
    sha256="b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    licence="Apache-2.0",
)
DINOV2_VITB14 = Checkpoint(
    "dinov2-vitb14",
    "dinov2_vitb14_pretrain.pth",
    f"{_META}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    licence="Apache-2.0",
)
DINOV2_VITL14 = Checkpoint(
    "dinov2-vitl14",
    "dinov2_vitl14_pretrain.pth",
    f"{_META}/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    licence="Apache-2.0",
)
# L2M++'s own ViT-L/14; nobody published its digest, so the first download decides.
DINOV2_VITL14_L2MPP = Checkpoint(
    "dinov2-vitl14-l2mpp", "dinov2l_distilled.pth", f"{_L2MPP}/dinov2l_distilled.pth"
)
