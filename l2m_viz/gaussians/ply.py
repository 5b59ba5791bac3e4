"""Gaussians as PLY files in the layout of 3D Gaussian Splatting, which splat viewers open.

One element ``vertex``, binary little-endian float32, in the order of Kerbl et al. (2023), gsplat and SuperSplat:

    x y z         centres
    nx ny nz      zeros; expected by some readers, used by none
    f_dc_0..2     spherical harmonics of degree 0: the colour is 0.5 + Y_00 f_dc
    f_rest_0..    of degree 1 and more: all K of red, then of green, then of blue
    opacity       logit
    scale_0..2    logarithms of the standard deviations
    rot_0..3      quaternion w x y z, of any length
    feat_0..      features, this project's own; other readers skip what they do not know

PLY has only bad places for what is not a vertex. gsplat.js, inside Gradio's Model3D, looks for the end of the header in
the first 10 KB and takes every ``property`` line for one of the vertices, so more elements or long comments break it.
Short text is therefore one comment line of JSON, and the PCA basis is an npz in the bytes after the last vertex, where
readers have stopped. The comment has the number and the SHA-256 of these bytes.
"""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy.lib.recfunctions import structured_to_unstructured
from torch import Tensor

from l2m_viz.data.files import atomic_write
from l2m_viz.encoders.pca import FeaturePCA
from l2m_viz.errors import FileFormatError, L2MError
from l2m_viz.gaussians.container import NUM_SH_REST, SH_C0, Gaussians, colors_from_sh_dc

_MARK = "l2m_viz "  # our comment line begins with it; JSON follows
_MAX_TEXT = 300  # bytes of JSON: with 384 features, this still leaves the header under the 10 KB of gsplat.js
_MAX_HEADER = 1 << 20  # bytes in which a header must end: room for some 40,000 properties
_TYPES = {  # of PLY, by their old and their new names, as numpy writes them
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
# Layouts, with numpy's sign of their byte order.
_BYTE_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_LIST = "list"  # in place of numpy's type


def write_ply(gaussians: Gaussians, path: str | Path) -> None:
    """Write Gaussians to a PLY file that splat viewers open, atomically.

    Everything comes back from `read_ply` bit for bit, but for ``colors`` that no ``sh_dc`` stands for: these go through
    f_dc and come back within 1e-7, or as 0 if they are negative without ``sh_rest``. Viewers that read 10 KB of header
    (gsplat.js, in Gradio) take 384 features without ``sh_rest`` and about 340 with degree 3; a file with more is as
    good, but they cannot open it.

    Raises:
        L2MError: ``backbone`` and ``length_unit`` are too long for the header.
        FileFormatError: the file cannot be written.
    """
    gaussians = gaussians.to("cpu")
    comments, block = _encode_metadata(gaussians)
    sh_rest = torch.empty(len(gaussians), 0, 3) if gaussians.sh_rest is None else gaussians.sh_rest
    columns = {
        "means": gaussians.means,
        "normals": torch.zeros_like(gaussians.means),
        "sh_dc": _sh_dc(gaussians),
        "sh_rest": sh_rest.transpose(1, 2).flatten(1),  # [n 3k] all of red first
        "logit_opacities": gaussians.logit_opacities[:, None],
        "log_scales": gaussians.log_scales,
        "quats": gaussians.quats,
        "features": torch.empty(len(gaussians), 0) if gaussians.features is None else gaussians.features,
    }
    names = _property_names(columns["sh_rest"].shape[1], columns["features"].shape[1])
    arrays = [columns[field].detach().float().numpy() for field in names]
    rows = np.concatenate(arrays, axis=1, dtype="<f4")  # [n p]
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {text}" for text in comments)]
    header += [f"element vertex {len(rows)}", *(f"property float {name}" for name in chain(*names.values()))]
    with atomic_write(path) as file:
        file.write("\n".join([*header, "end_header", ""]).encode("ascii"))
        file.write(rows.data)
        file.write(block)


def read_ply(path: str | Path) -> Gaussians:
    """Read a PLY file of 3D Gaussian Splatting, ours or another's.

    Properties may come in any order and of any type (all become float32), binary or ASCII; ``feat_*`` and ``f_rest_*``
    may be absent, unknown properties and elements are ignored. ``sh_dc`` is f_dc as it is in the file, ``colors`` the
    RGB that it stands for, and quaternions keep their length. Negative RGB is drawn as 0 (Kerbl et al. 2023): without
    ``sh_rest``, which could still raise it, it is read as 0.

    Raises:
        FileFormatError: the file is absent, truncated or no PLY, has other vertices than Gaussians, has values that no
            Gaussian can have, or its block of metadata is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = _read_header(file, path)
            names = _find_names(header.vertex, path)
            rows = _read_rows(file, header, [*chain(*names.values())], path)
            metadata = _read_metadata(file, header, path)
    except FileNotFoundError as error:
        raise FileFormatError(f"no such file {path}", todo="check the path") from error
    except OSError as error:
        raise FileFormatError(f"cannot read {path}", got=error.strerror or str(error)) from error
    ends = np.cumsum([len(group) for group in names.values()])
    parts = zip(names, np.split(rows, ends[:-1], axis=1), strict=True)
    values = {field: torch.from_numpy(np.ascontiguousarray(part)) for field, part in parts}
    colors = colors_from_sh_dc(values["sh_dc"])
    by_channel = values["sh_rest"].unflatten(1, (3, -1))  # [n 3 k]
    try:
        return Gaussians(
            means=values["means"],
            quats=values["quats"],
            log_scales=values["log_scales"],
            logit_opacities=values["logit_opacities"][:, 0],
            colors=colors if names["sh_rest"] else colors.clamp(min=0),
            features=values["features"] if names["features"] else None,
            sh_rest=by_channel.transpose(1, 2).contiguous() if names["sh_rest"] else None,
            sh_dc=values["sh_dc"],
            **metadata,
        )
    except L2MError as error:
        todo = "remove the rows that hold them, or ask who wrote the file"
        raise FileFormatError(f"cannot use {path}: {error}", todo=todo) from error


def _property_names(num_rest: int, num_features: int) -> dict[str, list[str]]:
    """Names of the properties of each field, in the file's order."""
    return {
        "means": ["x", "y", "z"],
        "normals": ["nx", "ny", "nz"],
        "sh_dc": _numbered("f_dc", 3),
        "sh_rest": _numbered("f_rest", num_rest),
        "logit_opacities": ["opacity"],
        "log_scales": _numbered("scale", 3),
        "quats": _numbered("rot", 4),
        "features": _numbered("feat", num_features),
    }


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{index}" for index in range(count)]


def _sh_dc(gaussians: Gaussians) -> Float[Tensor, "n 3"]:
    """The file's own coefficients, except where the colour has changed since: those rows get its coefficients."""
    derived = ((gaussians.colors.double() - 0.5) / SH_C0).to(gaussians.colors.dtype)
    if gaussians.sh_dc is None:
        return derived
    exact = colors_from_sh_dc(gaussians.sh_dc)
    unchanged = exact == gaussians.colors
    if gaussians.sh_rest is None:  # as read_ply clamps them
        unchanged |= exact.clamp(min=0) == gaussians.colors
    return torch.where(unchanged.all(dim=1, keepdim=True), gaussians.sh_dc, derived)


def _encode_metadata(gaussians: Gaussians) -> tuple[list[str], bytes]:
    """The comment line (none where there is nothing to say) and the bytes for the end of the file."""
    text = {"backbone": gaussians.backbone, "length_unit": gaussians.length_unit}
    meta: dict[str, Any] = {name: value for name, value in text.items() if value is not None}
    if (length := len(json.dumps(meta))) > _MAX_TEXT:
        expected, todo = f"at most {_MAX_TEXT} bytes together", "use shorter names"
        raise L2MError("write_ply: backbone and length_unit", expected=expected, got=f"{length}", todo=todo)
    block = b"" if gaussians.pca is None else gaussians.pca.to_bytes()
    if block:
        meta["pca"] = {"bytes": len(block), "sha256": hashlib.sha256(block).hexdigest()}
    return ([_MARK + json.dumps(meta)] if meta else []), block


@dataclass(frozen=True)
class _Element:
    """A table of a PLY file: how many rows, and its properties as (name, numpy's type or `_LIST`)."""

    name: str
    count: int
    properties: list[tuple[str, str]]

    @property
    def lists(self) -> list[str]:
        """Names of the properties without a fixed size."""
        return [name for name, kind in self.properties if kind == _LIST]

    def dtype(self, byte_order: str) -> np.dtype:
        """Of a binary row without lists."""
        return np.dtype([(name, byte_order + kind) for name, kind in self.properties])


@dataclass(frozen=True)
class _Header:
    """What a PLY file promises.

    Attributes:
        layout: "ascii", "binary_little_endian" or "binary_big_endian".
        before: Elements before the vertices.
        vertex: The vertices.
        comments: Without the word "comment".
        num_bytes: Length of the header.
    """

    layout: str
    before: list[_Element]
    vertex: _Element
    comments: list[str]
    num_bytes: int


def _read_header(file: IO[bytes], path: Path) -> _Header:
    """Parse the header and leave the rows alone: a header can promise more than fits into memory."""
    start = file.read(_MAX_HEADER)
    first = re.match(rb"ply(\r\n|\n|\r)", start)
    if first is None:
        got = f"one that begins with {start[:12]!r}" if start else "an empty one"
        raise _refusal(path, "a PLY file", got, "choose a .ply of 3D Gaussian Splatting")
    newline = first[1]
    last_line = newline + b"end_header" + newline
    if (length := start.find(last_line)) < 0:
        raise _refusal(
            path, "the line end_header", f"none in the first {len(start)} bytes", "the file is truncated"
        )
    # PLY is ASCII; what some write into comments is not.
    lines = start[:length].decode("ascii", "replace").split(newline.decode())[1:]
    layout, elements, comments = _parse_header(lines, path)
    at = next((i for i, element in enumerate(elements) if element.name == "vertex"), None)
    if at is None or not elements[at].count:
        got = ", ".join(f"{element.count} {element.name}" for element in elements) or "nothing"
        raise _refusal(path, "vertices", got)
    return _Header(layout, elements[:at], elements[at], comments, length + len(last_line))


def _parse_header(lines: list[str], path: Path) -> tuple[str, list[_Element], list[str]]:
    """Layout, elements and comments of a header without its first and last line."""
    layout, comments = "", []
    elements: list[_Element] = []
    for line in lines:
        match line.split():
            case [] | ["obj_info", *_]:
                pass
            case ["comment", *_]:
                comments.append(line.strip().removeprefix("comment").strip())
            case ["format", name, "1.0"] if name in _BYTE_ORDERS and not layout:
                layout = name
            case ["element", name, count] if re.fullmatch(r"\d{1,18}", count, re.ASCII):
                elements.append(_Element(name, int(count), []))
            case ["element", *_]:
                raise _refusal(path, "lines like 'element vertex 1000'", repr(line[:80]))
            case ["property", kind, name] if elements and kind in _TYPES:
                elements[-1].properties.append((name, _TYPES[kind]))
            case ["property", "list", size, kind, name] if elements and {size, kind} <= _TYPES.keys():
                elements[-1].properties.append((name, _LIST))
            case _:
                raise _refusal(path, "a PLY header", f"the line {line[:80]!r}")
    if not layout:
        raise _refusal(path, "a PLY header", "one without a line like 'format ascii 1.0'")
    _require_distinct(elements, path)
    return layout, elements, comments


def _require_distinct(elements: list[_Element], path: Path) -> None:
    tables = [("elements", [element.name for element in elements])]
    tables += [("properties", [name for name, _ in element.properties]) for element in elements]
    for what, names in tables:
        for name, times in Counter(names).most_common(1):
            if times > 1:
                raise _refusal(path, "a PLY header", f"two {what} with same name {name[:80]!r}")


def _find_names(vertex: _Element, path: Path) -> dict[str, list[str]]:
    """Names of the properties of each field that a file has; it may lack normals, f_rest and features."""
    properties = [name for name, _ in vertex.properties]
    present = set(properties)
    if vertex.lists:
        raise _refusal(path, "one number a property", f"lists in {', '.join(vertex.lists)}")
    num_rest = sum(re.fullmatch(r"f_rest_\d+", name) is not None for name in properties)
    num_features = sum(re.fullmatch(r"feat_\d+", name) is not None for name in properties)
    if num_rest not in {0, *(3 * k for k in NUM_SH_REST)}:
        expected = f"{', '.join(str(3 * k) for k in NUM_SH_REST)} properties f_rest, or none"
        raise _refusal(path, expected, str(num_rest))
    names = _property_names(num_rest, num_features)
    del names["normals"]
    if missing := [name for name in chain(*names.values()) if name not in present]:
        expected, got = "the properties of 3D Gaussian Splatting", f"none called {', '.join(missing[:20])}"
        todo = "a point cloud or a mesh is not made of Gaussians"
        if "packed_position" in present:
            todo = "the file is compressed: export it as an uncompressed PLY"
        if missing[0].startswith(("f_rest_", "feat_")):
            todo = "number them from 0 without gaps"
        raise _refusal(path, expected, got, todo)
    return names


def _read_rows(file: IO[bytes], header: _Header, names: list[str], path: Path) -> Float32[np.ndarray, "n p"]:
    """The named properties of all vertices; the file is left at the end of the last one."""
    num_bytes = os.fstat(file.fileno()).st_size
    file.seek(header.num_bytes)
    with np.errstate(over="ignore"):  # too much for float32 becomes infinite, which Gaussians refuse
        if header.layout == "ascii":
            return _read_ascii(file, header, names, num_bytes, path)
        return _read_binary(file, header, names, num_bytes, path)


def _read_binary(
    file: IO[bytes], header: _Header, names: list[str], num_bytes: int, path: Path
) -> Float32[np.ndarray, "n p"]:
    if any(element.lists for element in header.before):
        raise _refusal(path, "vertices first, or after elements of fixed size", "lists before the vertices")
    order = _BYTE_ORDERS[header.layout]
    skipped = sum(element.count * element.dtype(order).itemsize for element in header.before)
    dtype = header.vertex.dtype(order)
    promised, there = header.vertex.count * dtype.itemsize, num_bytes - header.num_bytes - skipped
    if promised > there:
        raise _truncated(path, header, f"{max(there, 0)} bytes instead of {promised}")
    file.seek(skipped, os.SEEK_CUR)
    rows = np.fromfile(file, dtype, header.vertex.count)
    return structured_to_unstructured(rows[names], dtype=np.float32)


def _read_ascii(
    file: IO[bytes], header: _Header, names: list[str], num_bytes: int, path: Path
) -> Float32[np.ndarray, "n p"]:
    properties = [name for name, _ in header.vertex.properties]
    # Each number takes a digit and a space or newline; the last newline may be absent.
    shortest, there = 2 * header.vertex.count * len(properties) - 1, num_bytes - header.num_bytes
    if shortest > there:
        raise _truncated(path, header, f"{there} bytes instead of at least {shortest}")
    skipped = sum(element.count for element in header.before)
    lines = [*islice(filter(bytes.strip, file), skipped, skipped + header.vertex.count)]
    if len(lines) != header.vertex.count:
        raise _truncated(path, header, f"{len(lines)} lines")
    try:
        rows = np.loadtxt(lines, np.float32, comments=None, ndmin=2)
    except ValueError as error:
        raise _refusal(path, "lines of numbers", str(error)) from error
    if rows.shape[1] != len(properties):
        raise _refusal(path, f"{len(properties)} numbers a line", str(rows.shape[1]))
    return rows[:, [properties.index(name) for name in names]]


def _read_metadata(file: IO[bytes], header: _Header, path: Path) -> dict[str, Any]:
    """Arguments of `Gaussians` from our comment line and the bytes after the vertices, where the file stands."""
    comment = next((line for line in header.comments if line.startswith(_MARK + "{")), None)
    if comment is None:
        return {}
    try:
        meta = json.loads(comment.removeprefix(_MARK))
        text = {name: meta[name] for name in ("backbone", "length_unit") if name in meta}
        size, digest = (meta["pca"]["bytes"], meta["pca"]["sha256"]) if "pca" in meta else (0, "")
        if not all(isinstance(value, str) for value in [*text.values(), digest]) or not isinstance(size, int):
            raise TypeError("a value is of another type")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        got = f"{type(error).__name__}: {error} in {comment[:80]!r}"
        raise _refusal(path, "a comment as write_ply writes it", got, "remove the comment") from error
    if not digest:
        return text
    block = file.read(max(0, min(size, os.fstat(file.fileno()).st_size)))
    if len(block) != size or hashlib.sha256(block).hexdigest() != digest:
        expected = f"the PCA basis in {size} bytes after the vertices, with SHA-256 {digest[:12]}..."
        todo = "it was cut off or changed; remove the comment l2m_viz to read the Gaussians without it"
        raise _refusal(
            path, expected, f"{len(block)} bytes, {hashlib.sha256(block).hexdigest()[:12]}...", todo
        )
    return {**text, "pca": FeaturePCA.from_bytes(block, f"the PCA basis in {path}")}


def _refusal(path: Path, expected: str, got: str, todo: str = "") -> FileFormatError:
    return FileFormatError(f"cannot read {path}", expected=expected, got=got, todo=todo)


def _truncated(path: Path, header: _Header, got: str) -> FileFormatError:
    todo = "the file is truncated, or its header damaged; get it again"
    return _refusal(path, f"{header.vertex.count} vertices as its header says", got, todo)
