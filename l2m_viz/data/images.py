"""Pictures in and out: whatever a user hands over becomes one float32 RGB tensor, or one clear `ImageError`.

An image inside the package is (H, W, 3), float32, RGB in [0, 1], channels last. Here is the only place that
knows about file formats, EXIF, palettes, alpha and 8-bit rounding. Files come from strangers: they are
recognised by their first bytes, sized from their header before a pixel is decoded, and only a few decoders
are ever reached (no PostScript, no vector formats). No state of Pillow's is read or changed for that, so
threads do not disturb each other.
"""

import io
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from l2m_viz.data.files import atomic_write
from l2m_viz.errors import ImageError, ShapeError, require_tensor
from l2m_viz.geometry import HW

MAX_PIXELS = 100_000_000  # a 100-megapixel photo becomes a 1.2 GB tensor
MAX_BYTES = 512 * 2**20  # of a file, before it is read
_FORMATS = "PNG, JPEG (also MPO), WebP, BMP, GIF, TIFF or PPM/PGM/PBM"
_RANGE_TOL = 1e-3  # floats may leave [0, 1] by this much (resampling, half precision); they are clipped
_WHITE = 1.0  # what lies behind a transparent pixel

ImageSource = str | Path | bytes | PIL.Image.Image | np.ndarray | Tensor


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Float[Tensor, "h w 3"]:
    """Turn a file, its bytes, a Pillow image or an array into RGB in [0, 1], in memory of its own.

    Files and Pillow images: EXIF orientation is applied, transparency is composited over white, of an
    animation the first frame is taken, CMYK, LAB, HSV and YCbCr become RGB, colour profiles are left alone.
    16 bits are kept for grey images and for RGB PNG; Pillow cuts other 16-bit colour files to 8. Integer
    greys wider than 8 bits count as 0..65535. Floating-point files follow the rule of floating-point arrays.

    Arrays and tensors: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of bool, uint8, uint16, or floats in [0, 1].

    Raises:
        ImageError: no such file, not a readable picture, truncated, more than ``max_pixels`` pixels or
            `MAX_BYTES` bytes, or an array whose values or dtype are not those of a picture.
        ShapeError: an array has other axes.

    >>> read_image(np.full((2, 3), 255, np.uint8)).shape
    torch.Size([2, 3, 3])
    """
    if isinstance(source, np.ndarray | Tensor):
        name = "the array" if isinstance(source, np.ndarray) else "the tensor"
        _check_axes(tuple(source.shape), name)
        _check_size((source.shape[1], source.shape[0]), name, max_pixels)
        array = _numpy_from_tensor(source) if isinstance(source, Tensor) else np.asarray(source)
        return _rgb_from_array(array, name)
    if isinstance(source, PIL.Image.Image):
        name = f"the Pillow image of mode {source.mode}"
        array = _guarded(lambda: _array_from_pil(source, name, max_pixels), name)
    elif isinstance(source, bytes):
        name = "the image bytes"
        array = _guarded(lambda: _array_from_bytes(source, name, max_pixels), name)
    elif isinstance(source, str | Path):
        name, data = str(source), _read_file(source)
        array = _guarded(lambda: _array_from_bytes(data, name, max_pixels), name)
    else:
        expected = "a path, bytes, a Pillow image or an array"
        raise ImageError("image", expected=expected, got=type(source).__name__)
    return _rgb_from_array(array, name)


def write_image(path: str | Path, image: Float[Tensor, "h w 3"]) -> None:
    """Write a PNG (8 bits, lossless) or a JPEG (quality 95, full-resolution colour), by suffix, atomically.

    Raises:
        ImageError: another suffix, or NaN in the image.
        ShapeError: the image is not (H, W, 3).
    """
    path = Path(path)
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    kind = formats.get(path.suffix.lower())
    if kind is None:
        expected = "a name in .png, .jpg or .jpeg"
        raise ImageError(f"cannot write {path}", expected=expected, got=repr(path.suffix))
    picture = PIL.Image.fromarray(_uint8(image))
    with atomic_write(path) as file:
        picture.save(file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))


def to_uint8(image: Float[Tensor, "h w 3"]) -> np.ndarray:
    """Round an image to 8 bits, (H, W, 3) uint8; values outside [0, 1] are clipped.

    Raises:
        ImageError: the image holds NaN.
        ShapeError: the image is not (H, W, 3).

    >>> to_uint8(torch.tensor([[[0.0, 0.5, 1.2]]])).tolist()
    [[[0, 128, 255]]]
    """
    return _uint8(image)


def resize_image(image: Float[Tensor, "h w 3"], hw: HW) -> Float[Tensor, "h2 w2 3"]:
    """Resample to ``hw`` = (H, W): bilinear when enlarging, a triangle as wide as new pixels when shrinking.

    The image keeps spanning [0, W] x [0, H] (half-pixel centres), so that normalised coordinates stay what
    they were.

    Raises:
        ShapeError: the image is not (H, W, 3) or ``hw`` has no pixels.
    """
    _check_image(image)
    if min(hw) < 1:
        raise ShapeError("resize_image", expected="a size of at least (1, 1)", got=f"{tuple(hw)}")
    if tuple(image.shape[:2]) == tuple(hw):
        return image
    channels_first = image.permute(2, 0, 1)[None]  # [1 3 h w]
    resized = F.interpolate(channels_first, tuple(hw), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).clamp(0, 1).contiguous()  # the weights add up to 1 but for rounding


def fit_long_side(image: Float[Tensor, "h w 3"], long_side: int) -> Float[Tensor, "h2 w2 3"]:
    """Shrink until the longer side has at most ``long_side`` pixels, keeping the aspect ratio; never enlarge.

    Raises:
        ShapeError: the image is not (H, W, 3) or ``long_side`` is below 1.
    """
    _check_image(image)
    if long_side < 1:
        raise ShapeError("fit_long_side", expected="long_side of at least 1 px", got=f"{long_side}")
    height, width = image.shape[:2]
    scale = min(1.0, long_side / max(height, width))
    return resize_image(image, (max(1, round(height * scale)), max(1, round(width * scale))))


def cut_to(image: Float[Tensor, "h w 3"], hw: HW) -> Float[Tensor, "h2 w2 3"]:
    """The largest middle part of the shape of ``hw``, resized to it: cut, not squeezed.

    Raises:
        ShapeError: the image is not (H, W, 3) or ``hw`` has no pixels.
    """
    _check_image(image)
    if min(hw) < 1:
        raise ShapeError("cut_to", expected="a size of at least (1, 1)", got=f"{tuple(hw)}")
    height, width = image.shape[:2]
    scale = min(height / hw[0], width / hw[1])
    rows, columns = (
        max(1, min(full, round(side * scale))) for side, full in zip(hw, (height, width), strict=True)
    )
    top, left = (height - rows) // 2, (width - columns) // 2
    return resize_image(image[top : top + rows, left : left + columns], hw)


# --- files -----------------------------------------------------------------------------------------------


class _Bytes(io.BytesIO):
    """A file in memory that can be told to raise at its end instead of returning nothing.

    Pillow fills what is missing with grey when some library has set its global LOAD_TRUNCATED_IMAGES; it
    cannot when the end of the file is an error.
    """

    end_is_error = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if not data and size != 0 and self.end_is_error:
            raise EOFError("the file ends too early")
        return data


def _read_file(path: str | Path) -> bytes:
    """Read a regular file of at most `MAX_BYTES`."""
    todo = "check the path; web addresses are not fetched"
    try:
        info = Path(path).stat()
        mode, size = info.st_mode, info.st_size
        if stat.S_ISREG(mode) and size <= MAX_BYTES:  # anything else may block or never end
            with Path(path).open("rb") as file:
                return file.read(MAX_BYTES)
    except FileNotFoundError as error:
        raise ImageError(f"no such file {path}", todo=todo) from error
    except PermissionError as error:
        todo = "make the file readable"
        raise ImageError(f"cannot open {path}", got="permission denied", todo=todo) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(f"cannot open {str(path)[:200]!r}", got=str(error)[:200], todo=todo) from error
    if stat.S_ISREG(mode):
        got = f"{size / 2**20:.0f} MiB"
        raise ImageError(f"{path} is too large", expected=f"at most {MAX_BYTES // 2**20} MiB", got=got)
    got = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
    raise ImageError(f"cannot read {path}", expected="a picture file", got=got, todo="name one file")


def _guarded(decode: Callable[[], np.ndarray], name: str) -> np.ndarray:
    """Run a decoder; what it raises on hostile input (struct.error, MemoryError...) is an ImageError."""
    try:
        return decode()
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(
            f"cannot read {name}",
            expected="a whole picture",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            todo="the file is damaged or truncated; export it again as PNG or JPEG",
        ) from error


def _array_from_bytes(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """Decode a file's bytes to the arrays that `_rgb_from_array` takes."""
    if len(data) > MAX_BYTES:
        got = f"{len(data) / 2**20:.0f} MiB"
        raise ImageError(f"{name} is too large", expected=f"at most {MAX_BYTES // 2**20} MiB", got=got)
    stream = _Bytes(data)
    image = _plugin(data, name)(stream)  # reads the header only
    if isinstance(image, TiffImageFile):
        # A tile is decoded whole, and that of a small picture may be huge: tags TileWidth, TileLength.
        tile_wh = image.tag_v2.get(322, 1), image.tag_v2.get(323, 1)
        _check_size(tile_wh, f"a tile of {name}", max_pixels)
    _check_size(image.size, name, max_pixels)
    stream.end_is_error = True
    with image:
        return _array_from_pil(image, name, max_pixels, png=data)


def _plugin(data: bytes, name: str) -> type[ImageFile]:
    """Choose the decoder by the first bytes. MPO is a JPEG with more pictures behind the first."""
    starts = {
        b"\x89PNG\r\n\x1a\n": PngImageFile,
        b"\xff\xd8\xff": JpegImageFile,
        b"BM": BmpImageFile,
        b"GIF87a": GifImageFile,
        b"GIF89a": GifImageFile,
        **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
        **dict.fromkeys((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"), PpmImageFile),
    }
    for start, plugin in starts.items():
        if data.startswith(start):
            return plugin
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    raise _foreign(data, name)


def _foreign(data: bytes, name: str) -> ImageError:
    """Say what the file seems to be instead of a picture."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        got = "an empty file"
    elif head.startswith(b"%pdf"):
        got = "a PDF"
    elif head.startswith(b"%!ps"):
        got = "PostScript"
    elif b"<svg" in head:
        got = "an SVG drawing"
    elif data[4:8] == b"ftyp":
        got = "HEIC, AVIF or a video"
    elif b"\0" not in head and head.decode("utf-8", "ignore").encode()[:400] == head[:400]:
        got = "text"
    else:
        got = f"a file that starts with {data[:8]!r}"
    todo = "save the picture as PNG or JPEG"
    return ImageError(f"cannot read {name}", expected=_FORMATS, got=got, todo=todo)


def _array_from_pil(image: PIL.Image.Image, name: str, max_pixels: int, png: bytes = b"") -> np.ndarray:
    """Decode a Pillow image, upright, to the arrays that `_rgb_from_array` takes."""
    _check_size(image.size, name, max_pixels)
    image.load()
    # Orientation after load(): Pillow turns TIFF itself in there, and PNG may carry EXIF behind the pixels.
    return _upright(_keep_sixteen_bits(_array_from_loaded(image, name), png), _orientation(image))


def _array_from_loaded(image: PIL.Image.Image, name: str) -> np.ndarray:
    mode = image.mode
    if mode == "F" or mode.startswith("I;16"):
        return np.asarray(image)
    if mode == "I":
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            got = f"{wide.min()}..{wide.max()}"
            todo = "save it with 16 bits"
            raise ImageError(f"{name} holds 32-bit integers", expected="0..65535", got=got, todo=todo)
        return wide.astype(np.uint16)
    if mode == "LAB":
        return _rgb_from_lab(image)
    if mode == "La":
        image = image.convert("LA")
    alpha = image.has_transparency_data and mode not in ("CMYK", "YCbCr", "HSV")
    wanted = "RGBA" if alpha else "RGB"
    return np.asarray(image if mode == wanted else image.convert(wanted))  # `convert` always copies


def _rgb_from_lab(image: PIL.Image.Image) -> np.ndarray:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # None only with inPlace
    return np.asarray(converted)


def _keep_sixteen_bits(eight: np.ndarray, png: bytes) -> np.ndarray:
    """Replace the upper bytes that Pillow keeps of a 16-bit colour PNG by OpenCV's 16 bits, if they agree.

    Pillow decodes first because it checks lengths and checksums; a disagreement (a format corner that one of
    them reads differently) leaves Pillow's answer.
    """
    if png[:4] != b"\x89PNG" or png[24:26] not in (b"\x10\x02", b"\x10\x06"):  # IHDR: bit depth, colour type
        return eight
    import cv2

    try:
        wide = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return eight
    if wide is None or wide.dtype != np.uint16 or wide.shape != eight.shape:
        return eight
    wide = wide[..., [2, 1, 0, 3][: wide.shape[2]]]  # BGR(A) -> RGB(A)
    return wide if np.array_equal(np.right_shift(wide, 8), eight) else eight


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation, 1 to 8; damaged EXIF is no reason to refuse a good picture and counts as 1."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, which says where row 0 and column 0 of the stored array lie when upright."""
    if orientation >= 5:  # rows of the file are columns of the picture
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


# --- arrays ----------------------------------------------------------------------------------------------


def _check_size(wh: tuple[int, int], name: str, max_pixels: int) -> None:
    if min(wh) < 1 or wh[0] * wh[1] > max_pixels:
        raise ImageError(
            f"size of {name}",
            expected=f"1 to {max_pixels / 1e6:g} million pixels",
            got=f"{wh[0]}x{wh[1]}",
            todo="resize the picture first, or raise max_pixels if you trust it" if min(wh) else "",
        )


def _check_axes(shape: tuple[int, ...], name: str) -> None:
    expected = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)):
        if 0 in shape:
            raise ShapeError(f"{name} has no pixels", expected=expected, got=f"{shape}")
        return
    todo = ""
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        todo = "channels come last: use image.permute(1, 2, 0), or image.transpose(1, 2, 0) in NumPy"
    elif len(shape) == 4:
        todo = "read the images of a batch one by one"
    raise ShapeError(f"axes of {name}", expected=expected, got=f"{shape}", todo=todo)


def _check_image(image: Tensor) -> None:
    require_tensor("image", image)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ShapeError("image", expected="(H, W, 3) with at least one pixel", got=f"{tuple(image.shape)}")


def require_image(name: str, image: Tensor) -> None:
    """Refuse what is not a float image (H, W, 3) with values in [0, 1].

    Raises:
        ShapeError: another shape.
        ImageError: integers, values that are not finite, or outside [0, 1].
    """
    _check_image(image)
    if not image.is_floating_point():
        todo = "read_image turns bytes into floats"
        raise ImageError(f"{name}: the image", expected="floats in [0, 1]", got=str(image.dtype), todo=todo)
    low, high = (value.item() for value in image.detach().aminmax())  # NaN if there is one
    _check_range(low, high, f"{name}: the image")


def _numpy_from_tensor(tensor: Tensor) -> np.ndarray:
    try:
        tensor = tensor.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    except Exception as error:  # sparse, quantised, meta, 8-bit floats
        got = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
        raise ImageError("the tensor is no picture", expected="a dense tensor", got=got) from error


def _rgb_from_array(array: np.ndarray, name: str) -> Tensor:
    """Scale to [0, 1] by dtype, composite alpha over white, repeat grey; always a copy."""
    full = {"bool": 1, "uint8": 255, "uint16": 65535}.get(array.dtype.name)
    if full is None and array.dtype.kind != "f":
        raise ImageError(
            f"dtype of {name}",
            expected="bool, uint8, uint16, or floats in [0, 1]",
            got=f"{array.dtype}",
            todo="convert it; the range of other types is ambiguous",
        )
    if full is None:
        _check_range(float(array.min()), float(array.max()), name)
    values = torch.from_numpy(array.astype(np.float32, order="C", copy=True))
    values = values.clamp_(0, 1) if full is None else values.div_(full)
    if values.ndim == 2:
        values = values[..., None]
    if values.shape[2] == 4:
        # lerp is exact at alpha 0 and 1, so that an opaque alpha changes nothing
        values = torch.lerp(torch.full_like(values[..., :3], _WHITE), values[..., :3], values[..., 3:])
    return values.expand(-1, -1, 3).contiguous()  # [h w 3]


def _check_range(low: float, high: float, name: str) -> None:
    got = f"{low:g}..{high:g}"
    if not (np.isfinite(low) and np.isfinite(high)):
        todo = "replace NaN and infinity first"
        raise ImageError(f"{name} is not finite", expected="values in [0, 1]", got=got, todo=todo)
    if low < -_RANGE_TOL or high > 1 + _RANGE_TOL:
        eight_bit = low >= 0 and 2 < high <= 255
        todo = "this looks like 0..255, divide by 255" if eight_bit else "scale it to [0, 1]"
        raise ImageError(f"values of {name}", expected="floats in [0, 1]", got=got, todo=todo)


def _uint8(image: Tensor) -> np.ndarray:
    _check_image(image)
    image = image.detach().float()
    if image.isnan().any():
        raise ImageError("image", expected="finite values", got=f"NaN in {int(image.isnan().sum())} places")
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
