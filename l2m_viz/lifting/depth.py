"""Where depth comes from: estimators, files, and the one place that turns disparity into depth.

Symbols: ``depth`` is z in the camera frame, metres if ``kind`` is "metric", the scene's own unit if
"relative"; ``disparity`` is inverse depth up to an unknown scale and shift, as depth networks give it.
"""

import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from l2m_viz.data.files import Saved
from l2m_viz.errors import FileFormatError, L2MError, MissingError, ShapeError, require_tensor
from l2m_viz.geometry.pixels import HW
from l2m_viz.lifting.depth_anything import VARIANTS, depth_anything_disparity, disparity_scale
from l2m_viz.lifting.prior import prior_disparity
from l2m_viz.lifting.random_planes import random_planes_disparity

DEPTH_RANGE = (
    1e-3,
    1e4,
)  # scene units; `depth_from_disparity` clips to it, the only epsilon of depth there is
MAX_PIXELS = 2**26  # 67 megapixels; a larger depth file is refused before it is decoded

_MAX_BYTES = 8 * MAX_PIXELS  # of a file, packed or unpacked
_SUFFIXES = (".npy", ".npz", ".png", ".tif", ".tiff", ".exr")


@dataclass(frozen=True)
class Depth(Saved):
    """Depth of every pixel and where it can be used; in invalid pixels the value is finite and means nothing.

    Raises:
        ShapeError: ``depth`` is not (H, W) float32 or ``valid_mask`` is not (H, W) bool.
        L2MError: no pixel is valid, a valid depth is not finite and positive, or ``kind`` is unknown.
    """

    depth: Float32[Tensor, "h w"]
    valid_mask: Bool[Tensor, "h w"]
    kind: Literal["metric", "relative"]
    method: str  # the estimator's name, or "file"

    def __post_init__(self) -> None:
        depth, valid = self.depth, self.valid_mask
        if depth.ndim != 2 or depth.shape != valid.shape or depth.numel() == 0:
            got = f"{tuple(depth.shape)} and {tuple(valid.shape)}"
            raise ShapeError("Depth", expected="depth and valid_mask of one shape (H, W)", got=got)
        if depth.dtype != torch.float32 or valid.dtype != torch.bool:
            raise ShapeError(
                "Depth", expected="float32 depth and bool mask", got=f"{depth.dtype}, {valid.dtype}"
            )
        if self.kind not in ("metric", "relative"):
            raise L2MError("Depth kind", expected='"metric" or "relative"', got=repr(self.kind))
        nearest, farthest = (value.item() for value in depth.aminmax())  # NaN if there is one
        if valid.all() and 0 < nearest <= farthest < float("inf"):
            return  # the usual case: nothing is masked and nothing is wrong
        if not valid.any():
            raise L2MError("Depth", expected="at least one valid pixel", got=f"0 of {valid.numel()}")
        usable = torch.isfinite(depth) & (depth > 0)
        if not usable[valid].all():
            got = f"{int((valid & ~usable).sum())} valid pixels that are not"
            raise L2MError(
                "Depth", expected="finite depth > 0 in valid pixels", got=got, todo="mask them out"
            )
        if not torch.isfinite(depth).all():
            raise L2MError("Depth", expected="finite numbers in invalid pixels too", got="NaN or infinity")

    @property
    def hw(self) -> HW:
        """Size (H, W) in pixels."""
        height, width = self.depth.shape
        return height, width

    @property
    def length_unit(self) -> str:
        """What one unit of depth is: "m" or "relative"."""
        return "m" if self.kind == "metric" else "relative"

    def resized(self, hw: HW) -> "Depth":
        """Take the nearest pixel at another size: an average across a depth edge would lie on no surface."""
        rows = ((torch.arange(hw[0]) + 0.5) * self.hw[0] / hw[0]).long()
        columns = ((torch.arange(hw[1]) + 0.5) * self.hw[1] / hw[1]).long()
        return replace(self, depth=self.depth[rows][:, columns], valid_mask=self.valid_mask[rows][:, columns])


def as_depth(depth: Depth | Float[Tensor, "h w"]) -> Depth:
    """Wrap a bare depth map, in which values that are not finite and positive count as unknown."""
    if isinstance(depth, Depth):
        return depth
    require_tensor("depth", depth)
    valid = torch.isfinite(depth) & (depth > 0)
    return Depth(torch.where(valid, depth, 1.0).float(), valid, "relative", "given")


def depth_from_disparity(
    disparity: Float[Tensor, "h w"],
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    depth_range: tuple[float, float] = DEPTH_RANGE,
    method: str = "disparity",
) -> Depth:
    """Turn affine disparity into relative depth, 1 / (scale * disparity + shift). No other code does this.

    Args:
        disparity: inverse depth up to scale and shift; where scale * disparity + shift is not finite or not
            positive, the result is invalid.
        scale: factor, negative if large numbers are far; for stereo 1 / (focal in px * baseline).
        shift: inverse depth where disparity is 0; a positive one keeps the sky valid, at depth 1 / shift.
        depth_range: nearest and farthest depth; what is positive but beyond is moved there and stays valid.
        method: name to keep in the result.

    Raises:
        L2MError: ``scale`` is 0, a parameter is not finite, not 0 < near < far, or no pixel is valid.

    >>> depth_from_disparity(torch.tensor([[2.0, 0.5, 0.0]]), scale=2.0).depth.tolist()
    [[0.25, 1.0, 1.0]]
    """
    _check_affine(scale, shift)
    near, far = depth_range
    if not 0 < near < far < float("inf"):
        raise L2MError("depth_range", expected="0 < near < far, finite", got=f"({near:g}, {far:g})")
    # in double precision: float32 would cancel where scale and shift differ in sign
    inverse_depth = disparity.to(torch.float64, copy=True).mul_(scale).add_(shift)
    valid = (inverse_depth > 0) & (inverse_depth < float("inf"))
    depth = inverse_depth.masked_fill_(~valid, 1.0).clamp_(1 / far, 1 / near).reciprocal_()
    return Depth(depth.float(), valid, "relative", method)


def estimate_depth(
    image: Float[Tensor, "h w 3"],
    method: str = "prior",
    K: Float[Tensor, "3 3"] | None = None,
    generator: torch.Generator | None = None,
) -> Depth:
    """Estimate the depth of one photo.

    Args:
        image: RGB in [0, 1].
        method: "prior" is a guess from rules without learned weights, plausible and measuring nothing; see
            `l2m_viz.lifting.prior`. "depth-anything-v2-small", "-base" and "-large" are networks, whose weights have
            to be on this machine; see `l2m_viz.lifting.networks`. "random-planes" invents a geometry, for training
            pairs only; see `l2m_viz.lifting.random_planes`. "flat" puts everything at distance 1, as if the photo
            were a print on a wall: its views are homographies, the 2D augmentation that stage 1 starts from.
        K: intrinsics in pixels, for estimators that can use them.
        generator: randomness of "random-planes"; the others draw nothing and always answer the same.

    Raises:
        ShapeError: the image is not (H, W, 3) or ``K`` not (3, 3).
        ImageError: the image has NaN or leaves [0, 1].
        MissingError: a package or the weights of the network are not here; the message says how to get them.
        FileFormatError: the weights are damaged or another network's.
        L2MError: no such method.
    """
    if method not in _ESTIMATORS:
        expected = "one of " + ", ".join(f'"{name}"' for name in sorted(_ESTIMATORS))
        raise L2MError("depth method", expected=expected, got=repr(method))
    require_tensor("estimate_depth: the image", image)
    return _ESTIMATORS[method](image, K, generator)


def read_depth(
    path: str | Path, kind: Literal["depth", "disparity"] = "depth", scale: float = 1.0, shift: float = 0.0
) -> Depth:
    """Read depth or disparity from .npy, .npz, .png (8 or 16 bit grey), .tif (grey, float too) or .exr.

    An integer 0 is unknown, and so is a depth of 0 in any file; what is not finite is invalid. An npz is a
    saved `Depth`, or holds one array, or one that is named as ``kind``. EXR needs an OpenCV built with it.

    Args:
        path: the file.
        kind: "depth": metric depth is raw * scale + shift. "disparity": relative, by `depth_from_disparity`.
        scale: 0.001 for depth in millimetres.
        shift: in metres for depth, in inverse depth for disparity.

    Raises:
        FileFormatError: the file is absent, truncated, foreign, too large, not one map, or all invalid.
        MissingError: an EXR file, and this OpenCV cannot read it.
        L2MError: ``kind`` is unknown, ``scale`` or ``shift`` cannot be used.
    """
    path = Path(path)
    if kind not in ("depth", "disparity"):
        raise L2MError("read_depth kind", expected='"depth" or "disparity"', got=repr(kind))
    _check_affine(scale, shift)
    if not path.is_file():  # nor a device or a pipe, which may block or never end
        what = f"{path} is a folder" if path.is_dir() else f"no such file {path}"
        raise FileFormatError(what, expected="one of " + ", ".join(_SUFFIXES), todo="check the path")
    if path.stat().st_size > _MAX_BYTES:
        got = f"{path.stat().st_size / 2**20:.0f} MiB"
        raise FileFormatError(f"{path} is too large", expected=f"at most {_MAX_BYTES // 2**20} MiB", got=got)
    try:
        return _read(path, kind, scale, shift)
    except (FileFormatError, MissingError):
        raise
    except L2MError as error:
        todo = f'check kind="{kind}", scale and shift'
        raise FileFormatError(f"{path} holds no usable {kind} ({error})", todo=todo) from error
    except Exception as error:  # a foreign file raises anything: zlib.error, BadZipFile, struct.error, ...
        got = f"{type(error).__name__}: {str(error)[:200]}"
        todo = "the file is truncated or foreign"
        raise FileFormatError(
            f"cannot read {path}", expected=f"a {path.suffix} file", got=got, todo=todo
        ) from error


def _estimate_prior(image: Tensor, K: Tensor | None, generator: torch.Generator | None) -> Depth:
    del generator  # nothing is drawn
    return depth_from_disparity(prior_disparity(image, K), method="prior")


def _estimate_random_planes(image: Tensor, K: Tensor | None, generator: torch.Generator | None) -> Depth:
    del K  # any camera may look at a random scene
    return depth_from_disparity(random_planes_disparity(image, generator), method="random-planes")


def _estimate_flat(image: Tensor, K: Tensor | None, generator: torch.Generator | None) -> Depth:
    del K, generator
    depth = torch.ones(image.shape[:2])
    return Depth(depth, torch.ones_like(depth, dtype=torch.bool), kind="relative", method="flat")


def _estimate_depth_anything(
    image: Tensor, K: Tensor | None, generator: torch.Generator | None, variant: str
) -> Depth:
    del K, generator  # it knows neither the camera nor chance
    disparity = depth_anything_disparity(image, variant)
    scale, shift = disparity_scale(disparity)
    return depth_from_disparity(disparity, scale=scale, shift=shift, method=f"depth-anything-v2-{variant}")


_ESTIMATORS: dict[str, Callable[[Tensor, Tensor | None, torch.Generator | None], Depth]] = {
    "prior": _estimate_prior,
    "random-planes": _estimate_random_planes,
    "flat": _estimate_flat,
    **{
        f"depth-anything-v2-{variant}": partial(_estimate_depth_anything, variant=variant)
        for variant in VARIANTS
    },
}


def _check_affine(scale: float, shift: float) -> None:
    numbers = all(isinstance(value, (int, float, np.number)) for value in (scale, shift))
    if not numbers or not (np.isfinite(scale) and np.isfinite(shift)) or scale == 0:
        expected, got = "finite numbers, scale not 0", f"{scale!r} and {shift!r}"
        raise L2MError("scale and shift", expected=expected, got=got)


def _read(path: Path, kind: str, scale: float, shift: float) -> Depth:
    """Choose the reader by the suffix; each then checks that the content is what the suffix says."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        with path.open("rb") as file:
            raw = _read_npy(file, path)
    elif suffix == ".npz":
        if _is_saved_depth(path):
            if kind != "depth" or scale != 1 or shift != 0:
                got = f"kind {kind}, scale {scale:g}, shift {shift:g}"
                raise FileFormatError(f"{path} is a saved Depth", expected="no kind, scale or shift", got=got)
            return Depth.load(path)
        raw = _read_npz(path, kind)
    elif suffix in (".png", ".tif", ".tiff"):
        raw = _read_grey(path)
    elif suffix == ".exr":
        raw = _read_exr(path)
    else:
        expected = "one of " + ", ".join(_SUFFIXES)
        raise FileFormatError(f"cannot read {path}", expected=expected, got=suffix or "no suffix")
    return _depth_from_raw(raw, kind, scale, shift)


def _depth_from_raw(raw: np.ndarray, kind: str, scale: float, shift: float) -> Depth:
    """Apply scale and shift to a file's numbers; unknown pixels become invalid."""
    known = raw != 0 if kind == "depth" or raw.dtype.kind in "iu" else np.ones(raw.shape, bool)
    values = torch.from_numpy(np.where(known, raw.astype(np.float64), np.nan))
    if kind == "disparity":
        return depth_from_disparity(values, scale=scale, shift=shift, method="file")
    depth = (values * scale + shift).float()
    valid = torch.isfinite(depth) & (depth > 0)
    return Depth(torch.where(valid, depth, torch.ones_like(depth)), valid, "metric", "file")


def _read_npy(file: IO[bytes] | zipfile.ZipExtFile, name: Path | str) -> np.ndarray:
    """Read one array after its header was found harmless: no pickle, two axes, not too large."""
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(file)
    if dtype.kind not in "iuf":
        todo = "save it with np.save as float32"
        raise FileFormatError(
            f"cannot read {name}", expected="an array of numbers", got=f"dtype {dtype}", todo=todo
        )
    _check_map(shape, name)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_npz(path: Path, kind: str) -> np.ndarray:
    """Read the array of an npz that is meant: the one named ``kind``, else the only one."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        name = kind if kind in names else names[0] if len(names) == 1 else None
        if name is None:
            raise FileFormatError(
                f"cannot read {path}", expected=f'one array, or one named "{kind}"', got=f"arrays {names}"
            )
        with archive.open(f"{name}.npy") as file:
            return _read_npy(file, f"{path}[{name}]")


def _is_saved_depth(path: Path) -> bool:
    """Say whether an npz was written by `Saved.save`, and refuse one that would fill the memory."""
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
        if size > _MAX_BYTES:
            got = f"{size / 2**20:.0f} MiB"
            raise FileFormatError(
                f"{path} is too large", expected=f"at most {_MAX_BYTES // 2**20} MiB", got=got
            )
        return "__meta__.npy" in archive.namelist()


def _read_grey(path: Path) -> np.ndarray:
    """Read a PNG or TIFF of one channel; the size is checked before anything is decoded."""
    data = path.read_bytes()
    plugin = PngImageFile if path.suffix.lower() == ".png" else TiffImageFile
    with plugin(io.BytesIO(data)) as picture:  # reads the header only; another format raises SyntaxError
        _check_map((picture.height, picture.width), path)
        if isinstance(picture, TiffImageFile):  # a small TIFF may be stored in one huge tile, decoded whole
            _check_map((picture.tag_v2.get(323, 1), picture.tag_v2.get(322, 1)), path)
        if picture.mode not in ("L", "I", "F") and not picture.mode.startswith("I;16"):
            todo = "a coloured picture of depth is not depth; save the numbers as 16-bit grey or npy"
            got = f"mode {picture.mode}"
            raise FileFormatError(f"cannot read {path}", expected="one grey channel", got=got, todo=todo)
        raw = np.asarray(picture)
    return raw.astype(raw.dtype.newbyteorder("="))  # some 16-bit files keep their own byte order


def _read_exr(path: Path) -> np.ndarray:
    """Read an EXR of one channel through OpenCV, where its build and its safety switch allow it."""
    todo = "save the depth as .npy or as a 16-bit .png"
    line = next((line for line in cv2.getBuildInformation().splitlines() if "OpenEXR" in line), "")
    if line.strip().endswith("NO") or not line:
        raise MissingError(f"cannot read {path}: this OpenCV was built without OpenEXR", todo=todo)
    if os.environ.get("OPENCV_IO_ENABLE_OPENEXR") != "1":
        todo = f"set the environment variable OPENCV_IO_ENABLE_OPENEXR=1 before Python starts, or {todo}"
        raise MissingError(f"cannot read {path}: OpenCV keeps OpenEXR switched off", todo=todo)
    raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if raw is None:
        raise FileFormatError(
            f"cannot read {path}", expected="an EXR file", got="something else or a part of one"
        )
    _check_map(raw.shape, path)
    return raw


def _check_map(shape: tuple[int, ...], name: Path | str) -> None:
    if len(shape) != 2 or 0 in shape:
        raise FileFormatError(f"cannot read {name}", expected="one map (H, W)", got=f"shape {shape}")
    if shape[0] * shape[1] > MAX_PIXELS:
        got = f"{shape[1]}x{shape[0]}"
        raise FileFormatError(f"{name} is too large", expected=f"at most {MAX_PIXELS} pixels", got=got)
