"""Files that are whole or absent: atomic writes, npz without pickles, results that save themselves."""

import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import IO, Any, TypeVar, get_args

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
    with atomic_write(path) as file:
        _write_npz(file, arrays, meta)


def load_npz(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_npz` wrote.

    Raises:
        FileFormatError: the file is absent, truncated, not an npz, holds pickles, or is not from `save_npz`.
    """
    try:
        # opened here because np.load leaves its own handle open when the archive is damaged
        with Path(path).open("rb") as file:
            return _read_npz(file, path)
    except FileNotFoundError as error:
        raise FileFormatError(f"no such file {path}", todo="check the path") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _write_npz(file: IO[bytes] | io.BytesIO, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    encoded = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez(file, __meta__=encoded, **arrays)  # pyright: ignore[reportArgumentType]


def _read_npz(file: IO[bytes] | io.BytesIO, name: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        meta = json.loads(arrays.pop("__meta__").tobytes().decode())
        if not isinstance(meta, dict):
            raise TypeError(f"meta is a {type(meta).__name__}")
    except Exception as error:  # a foreign file raises anything: zlib.error, BadZipFile, struct.error, ...
        raise _unreadable(name, error) from error
    return arrays, meta


def _unreadable(name: str | Path, error: Exception) -> FileFormatError:
    return FileFormatError(
        f"cannot read {name}",
        expected="an npz written by l2m_viz",
        got=f"{type(error).__name__}: {error}",
        todo="the file is truncated or foreign; write it again",
    )


class Saved:
    """Mixin of frozen dataclasses of tensors: ``save`` to and ``load`` from one npz.

    Fields that are not tensors (None, numbers, text, tuples of these) travel as JSON beside the arrays. A field that is
    itself a `Saved` has its fields beside the others under dotted names (``pca.mean``), and its type under its own.
    """

    def save(self, path: str | Path) -> None:
        """Write every field: tensors as arrays, the rest as JSON beside them."""
        arrays, plain = _flatten(self)
        save_npz(path, arrays, {"type": type(self).__name__, "fields": plain})

    @classmethod
    def load(cls: type[_Result], path: str | Path) -> _Result:
        """Read an object back.

        Raises:
            FileFormatError: the file is damaged, or holds another type or other fields.
        """
        return _restored(cls, path, *load_npz(path))

    def to_bytes(self) -> bytes:
        """What `save` writes, to be put inside another file."""
        buffer = io.BytesIO()
        arrays, plain = _flatten(self)
        _write_npz(buffer, arrays, {"type": type(self).__name__, "fields": plain})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls: type[_Result], data: bytes, name: str) -> _Result:
        """Read back what `to_bytes` gave; ``name`` says in errors where it came from.

        Raises:
            FileFormatError: as `load`.
        """
        return _restored(cls, name, *_read_npz(io.BytesIO(data), name))


def _flatten(saved: Saved) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays: dict[str, np.ndarray] = {}
    plain: dict[str, Any] = {}
    for field in fields(saved):  # pyright: ignore[reportArgumentType]
        value = getattr(saved, field.name)
        if isinstance(value, Tensor):
            arrays[field.name] = value.detach().cpu().numpy()
        elif isinstance(value, Saved):
            inner_arrays, inner_plain = _flatten(value)
            arrays |= {f"{field.name}.{name}": array for name, array in inner_arrays.items()}
            plain |= {f"{field.name}.{name}": item for name, item in inner_plain.items()}
            plain[field.name] = {"type": type(value).__name__}
        else:
            plain[field.name] = value
    return arrays, plain


def _restored(
    cls: type[_Result], name: str | Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]
) -> _Result:
    """Build an object of ``cls`` from what one file held; ``name`` is the file's."""
    plain = dict(meta["fields"]) if isinstance(meta.get("fields"), dict) else {}
    if twice := sorted(plain.keys() & arrays.keys()):
        raise FileFormatError(f"cannot load {name}", expected="each field once", got=f"{twice} twice")
    try:
        values = {key: _tuples(value) for key, value in plain.items()}
        values |= {key: torch.from_numpy(array) for key, array in arrays.items()}
    except TypeError as error:  # text, or bytes in another order
        got = str(error)
        raise FileFormatError(f"cannot load {name}", expected="arrays of numbers", got=got) from error
    return _build(cls, name, meta.get("type"), values)


def _build(cls: type[_Result], name: str | Path, type_name: object, values: dict[str, Any]) -> _Result:
    """Build an object, innermost fields first; ``values`` has dotted names."""
    own = dict(values)
    for field in fields(cls):  # pyright: ignore[reportArgumentType]
        inner, mark, prefix = _saved_type(field), own.get(field.name), f"{field.name}."
        if inner is not None and mark is not None:
            below = {key: own.pop(key) for key in values if key.startswith(prefix)}
            below = {key.removeprefix(prefix): value for key, value in below.items()}
            inner_name = mark.get("type") if isinstance(mark, dict) else mark
            own[field.name] = _build(inner, f"{name} ({field.name})", inner_name, below)
    known = {field.name for field in fields(cls)}  # pyright: ignore[reportArgumentType]
    required = {field.name for field in fields(cls) if _has_no_default(field)}  # pyright: ignore[reportArgumentType]
    if type_name != cls.__name__ or not required <= own.keys() <= known:
        got = f"a {type_name} with {sorted(own)}"
        wanted = f"a {cls.__name__} with {sorted(required)}"
        todo = "fields that this version does not know come from a newer one"
        raise FileFormatError(f"cannot load {name}", expected=wanted, got=got, todo=todo)
    return cls(**own)


def _saved_type(field: Field[Any]) -> type[Saved] | None:
    """The `Saved` class that a field may hold, by its annotation (``FeaturePCA | None``), or None."""
    candidates = get_args(field.type) or (field.type,)
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Saved)), None)


def _has_no_default(field: Field[Any]) -> bool:
    """A field that came later has a default, so that files written before it still load."""
    return field.default is MISSING and field.default_factory is MISSING


def _tuples(value: Any) -> Any:  # noqa: ANN401
    """JSON knows no tuples; frozen results hold no lists."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
