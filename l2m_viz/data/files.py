"""Files that are whole or absent: atomic writes, npz without pickles, and results that save and load themselves."""

import json
import os
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from l2m_viz.errors import FileFormatError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under ``path`` only when the block ends without an error.

    The bytes go to a temporary file in the same folder, which is renamed at the end; a killed process leaves the old
    file, if there was one, untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def save_npz(path: str | Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays and JSON-able ``meta`` into one compressed npz, atomically and without pickles."""
    encoded = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    with atomic_write(path) as file:
        np.savez_compressed(file, __meta__=encoded, **arrays)  # pyright: ignore[reportArgumentType]


def load_npz(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_npz` wrote.

    Raises:
        FileFormatError: the file is absent, truncated, not an npz, holds pickles, or was not written by `save_npz`.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(arrays.pop("__meta__").tobytes().decode())
    except FileNotFoundError as error:
        raise FileFormatError(f"no such file {path}", todo="check the path") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as error:
        raise FileFormatError(
            f"cannot read {path}",
            expected="an npz written by l2m_viz",
            got=f"{type(error).__name__}: {error}",
            todo="the file is truncated or foreign; write it again",
        ) from error
    return arrays, meta


class Saved:
    """Mixin of frozen dataclasses of tensors: ``save`` to and ``load`` from one npz, None and plain fields included."""

    def save(self, path: str | Path) -> None:
        """Write every field: tensors as arrays, the rest as JSON beside them."""
        arrays: dict[str, np.ndarray] = {}
        plain: dict[str, Any] = {}
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                arrays[field.name] = value.detach().cpu().numpy()
            else:
                plain[field.name] = list(value) if isinstance(value, tuple) else value
        save_npz(path, arrays, {"type": type(self).__name__, "fields": plain})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an object back.

        Raises:
            FileFormatError: the file is damaged, or holds another type or other fields.
        """
        arrays, meta = load_npz(path)
        names = {field.name for field in fields(cls)}  # pyright: ignore[reportArgumentType]
        values = {**meta.get("fields", {}), **arrays}
        if meta.get("type") != cls.__name__ or set(values) != names:
            got = f"a {meta.get('type')} with {sorted(values)}"
            raise FileFormatError(f"cannot load {path}", expected=f"a {cls.__name__} with {sorted(names)}", got=got)
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["fields"].items()}
        return cls(**plain, **{k: torch.from_numpy(v) for k, v in arrays.items()})
