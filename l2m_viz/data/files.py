"""Files that are whole or absent: atomic writes, npz without pickles, results that save themselves."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from l2m_viz.errors import FileFormatError

# Not typing.Self, which the run-time checker of the tests rejects.
_Result = TypeVar("_Result", bound="Saved")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under ``path`` only when the block ends without an error.

    The bytes go to a temporary file in the same folder, which is renamed at the end; a killed process leaves
    the old file, if there was one, untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        _discard(temporary)
        todo = "choose a folder that you can write to, with space left"
        raise FileFormatError(f"cannot write {path}", got=error.strerror or str(error), todo=todo) from error
    except BaseException:
        _discard(temporary)
        raise


def remove_file(path: Path) -> None:
    """Remove a file if it is there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise FileFormatError(f"cannot remove {path}", got=error.strerror or str(error)) from error


def _discard(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def save_npz(path: str | Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays and JSON-able ``meta`` to an npz, atomically, no pickles; floats hardly shrink: stored."""
    encoded = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    with atomic_write(path) as file:
        np.savez(file, __meta__=encoded, **arrays)  # pyright: ignore[reportArgumentType]


def load_npz(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_npz` wrote.

    Raises:
        FileFormatError: the file is absent, truncated, not an npz, holds pickles, or is not from `save_npz`.
    """
    try:
        # opened here because np.load leaves its own handle open when the archive is damaged
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(arrays.pop("__meta__").tobytes().decode())
        if not isinstance(meta, dict):
            raise TypeError(f"meta is a {type(meta).__name__}")
    except FileNotFoundError as error:
        raise FileFormatError(f"no such file {path}", todo="check the path") from error
    except Exception as error:  # a foreign file raises anything: zlib.error, BadZipFile, struct.error, ...
        raise FileFormatError(
            f"cannot read {path}",
            expected="an npz written by l2m_viz",
            got=f"{type(error).__name__}: {error}",
            todo="the file is truncated or foreign; write it again",
        ) from error
    return arrays, meta


class Saved:
    """Mixin of frozen dataclasses of tensors: ``save`` to and ``load`` from one npz.

    Fields that are not tensors (None, numbers, text, tuples of these) travel as JSON beside the arrays.
    """

    def save(self, path: str | Path) -> None:
        """Write every field: tensors as arrays, the rest as JSON beside them."""
        arrays: dict[str, np.ndarray] = {}
        plain: dict[str, Any] = {}
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                arrays[field.name] = value.detach().cpu().numpy()
            else:
                plain[field.name] = value
        save_npz(path, arrays, {"type": type(self).__name__, "fields": plain})

    @classmethod
    def load(cls: type[_Result], path: str | Path) -> _Result:
        """Read an object back.

        Raises:
            FileFormatError: the file is damaged, or holds another type or other fields.
        """
        arrays, meta = load_npz(path)
        plain = meta["fields"] if isinstance(meta.get("fields"), dict) else {}
        names = {field.name for field in fields(cls)}  # pyright: ignore[reportArgumentType]
        required = {field.name for field in fields(cls) if _has_no_default(field)}  # pyright: ignore[reportArgumentType]
        if (
            meta.get("type") != cls.__name__
            or not required <= {*plain, *arrays} <= names
            or plain.keys() & arrays
        ):
            got = f"a {meta.get('type')} with {sorted([*plain, *arrays])}"
            wanted = f"a {cls.__name__} with {sorted(required)}"
            todo = "fields that this version does not know come from a newer one"
            raise FileFormatError(f"cannot load {path}", expected=wanted, got=got, todo=todo)
        try:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        except TypeError as error:  # text, or bytes in another order
            got = str(error)
            raise FileFormatError(f"cannot load {path}", expected="arrays of numbers", got=got) from error
        return cls(**{name: _tuples(value) for name, value in plain.items()}, **tensors)


def _has_no_default(field: Field[Any]) -> bool:
    """A field that came later has a default, so that files written before it still load."""
    return field.default is MISSING and field.default_factory is MISSING


def _tuples(value: Any) -> Any:  # noqa: ANN401
    """JSON knows no tuples; frozen results hold no lists."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
