"""read_image and its kin, judged by Pillow's own writers, closed forms, and by what must not happen."""

import functools
import inspect
import io
import os
import random
import resource
import struct
import threading
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import skimage.color
import torch
from PIL import ImageFile

from l2m_viz.data import cut_to, fit_long_side, read_image, resize_image, to_uint8, write_image
from l2m_viz.data.images import MAX_PIXELS
from l2m_viz.errors import ImageError, L2MError, ShapeError

H, W = 37, 53


def unchecked(function):
    """The function without jaxtyping's run-time check, so that our own message is what is tested."""
    return inspect.unwrap(function)


@pytest.fixture
def rgb8() -> np.ndarray:
    y, x = np.mgrid[:H, :W]
    return np.stack([x * 255 // (W - 1), y * 255 // (H - 1), (x * 7 + y * 3) % 256], -1).astype(np.uint8)


def encode(image: PIL.Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_float(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32) / 255)


def assert_is_image(image: torch.Tensor) -> None:
    assert image.dtype == torch.float32
    assert image.ndim == 3 and image.shape[2] == 3 and image.numel() > 0
    assert image.is_contiguous()
    assert image.min() >= 0 and image.max() <= 1


# --- what is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_come_back_exactly(rgb8, kind, options, tmp_path):
    data = encode(PIL.Image.fromarray(rgb8), kind, **options)
    path = tmp_path / "photo with no suffix"
    path.write_bytes(data)
    for source in (data, path, str(path), PIL.Image.open(io.BytesIO(data))):
        image = read_image(source)
        assert_is_image(image)
        assert torch.equal(image, as_float(rgb8))


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP"])
def test_lossy_formats_come_back_nearly(kind):
    y, x = np.mgrid[:H, :W]
    smooth = np.stack([x * 4, y * 6, 255 - x * 4], -1).astype(np.uint8)
    other = PIL.Image.fromarray(255 - smooth)
    options = {"append_images": [other], "save_all": True} if kind == "MPO" else {}
    image = read_image(encode(PIL.Image.fromarray(smooth), kind, quality=95, **options))
    assert_is_image(image)
    assert (image - as_float(smooth)).abs().mean() < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, kind):
    # EXIF 2.3, tag 0x0112: where row 0 and column 0 of the stored array lie in the upright picture
    upright = np.zeros((48, 80, 3), np.uint8)
    upright[:24, :40] = (250, 10, 10)
    upright[:24, 40:] = (10, 250, 10)
    upright[24:, :40] = (10, 10, 250)
    stored_from_upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),  # row 0 is the right side: the camera was turned, show it clockwise
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = np.ascontiguousarray(stored_from_upright[orientation](upright))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(PIL.Image.fromarray(stored), kind, exif=exif, **({"quality": 95} if kind != "TIFF" else {}))
    for source in (data, PIL.Image.open(io.BytesIO(data))):
        image = read_image(source)
        assert tuple(image.shape) == (48, 80, 3)
        assert (image - as_float(upright)).abs().mean() < 0.02


def test_damaged_exif_does_not_cost_the_picture(rgb8):
    data = encode(PIL.Image.fromarray(rgb8), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert torch.equal(read_image(data), as_float(rgb8))


def test_alpha_is_composited_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]  # opaque red, nothing, black at 20 %
    expected = torch.tensor([[[1.0, 0, 0], [1, 1, 1], [0.8, 0.8, 0.8]]])
    for source in (rgba, encode(PIL.Image.fromarray(rgba), "PNG"), torch.from_numpy(rgba)):
        torch.testing.assert_close(read_image(source), expected)
    grey_alpha = PIL.Image.fromarray(np.array([[[0, 255], [0, 51]]], np.uint8), "LA")
    expected = torch.tensor([[[0.0] * 3, [0.8] * 3]])
    torch.testing.assert_close(read_image(encode(grey_alpha, "PNG")), expected)
    torch.testing.assert_close(read_image(grey_alpha.convert("La")), expected)


def test_opaque_alpha_changes_no_bit(rgb8):
    opaque = np.concatenate([rgb8, np.full((H, W, 1), 255, np.uint8)], -1)
    assert torch.equal(read_image(opaque), read_image(rgb8))


def test_palettes_with_and_without_transparency():
    image = PIL.Image.new("P", (3, 2), 1)
    image.putpalette([9, 9, 9, 0, 51, 255])
    image.putpixel((2, 0), 0)
    plain = read_image(encode(image, "PNG"))
    torch.testing.assert_close(plain[0, 0], torch.tensor([0.0, 0.2, 1.0]))
    torch.testing.assert_close(plain[0, 2], torch.full((3,), 9 / 255))
    for kind in ("PNG", "GIF"):
        see_through = read_image(encode(image, kind, transparency=0))
        torch.testing.assert_close(see_through[0, 2], torch.ones(3))
        torch.testing.assert_close(see_through[0, 0], torch.tensor([0.0, 0.2, 1.0]))


def test_grey_and_rgb_with_a_transparent_colour():
    grey = PIL.Image.fromarray(np.array([[7, 102, 7]], np.uint8))
    torch.testing.assert_close(
        read_image(encode(grey, "PNG", transparency=7))[0, :, 0], torch.tensor([1, 0.4, 1])
    )
    rgb = PIL.Image.fromarray(np.array([[[1, 2, 3], [0, 0, 0]]], np.uint8))
    image = read_image(encode(rgb, "PNG", transparency=(1, 2, 3)))
    torch.testing.assert_close(image, torch.tensor([[[1.0, 1, 1], [0, 0, 0]]]))


def test_one_bit():
    bits = np.array([[True, False, True], [False, False, True]])
    for source in (bits, encode(PIL.Image.fromarray(bits), "PNG"), encode(PIL.Image.fromarray(bits), "PPM")):
        assert torch.equal(read_image(source), torch.from_numpy(bits).float()[..., None].expand(2, 3, 3))


def test_cmyk_ycbcr_hsv_lab(rgb8):
    image = PIL.Image.fromarray(rgb8)
    torch.testing.assert_close(read_image(image.convert("CMYK")), as_float(rgb8), atol=0.005, rtol=0)
    torch.testing.assert_close(read_image(image.convert("YCbCr")), as_float(rgb8), atol=0.02, rtol=0)
    torch.testing.assert_close(read_image(image.convert("HSV")), as_float(rgb8), atol=0.05, rtol=0)
    jpeg = encode(
        PIL.Image.new("CMYK", (W, H), (0, 255, 255, 0)), "JPEG", quality=95
    )  # no cyan, no black: red
    assert (read_image(jpeg) - torch.tensor([1.0, 0, 0])).abs().max() < 0.03
    lab = np.array([[[50.0, 30, -40], [80, -20, 10]]])
    stored = (lab * [2.55, 1, 1] + [0, 128, 128]).round().astype(np.uint8)
    lab_image = PIL.Image.frombytes("LAB", (2, 1), (stored ^ np.array([0, 128, 128], np.uint8)).tobytes())
    expected = torch.from_numpy(skimage.color.lab2rgb(lab)).float()
    # a profile adapts its white with another matrix than skimage: a few per cent tell the axes and signs
    torch.testing.assert_close(read_image(lab_image), expected, atol=0.04, rtol=0)


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colour_png_keeps_its_precision(channels):
    wide = (np.arange(H * W * channels) * 601 % 65536).astype(np.uint16).reshape(H, W, channels)
    if channels == 4:
        wide[..., 3] = 65535
    ok, data = cv2.imencode(".png", wide)
    assert ok
    expected = wide[..., 2::-1].astype(np.float64) / 65535  # OpenCV stores BGR
    image = read_image(data.tobytes())
    torch.testing.assert_close(image.double(), torch.from_numpy(expected.copy()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_sixteen_bit_grey_keeps_its_precision(kind):
    wide = (np.arange(H * W) * 33 % 65536).astype(np.uint16).reshape(H, W)
    _, data = cv2.imencode(kind, wide)
    expected = torch.from_numpy(wide.astype(np.float32) / 65535)[..., None].expand(H, W, 3)
    torch.testing.assert_close(read_image(data.tobytes()), expected, atol=1e-6, rtol=0)
    assert torch.equal(read_image(wide), read_image(data.tobytes()))
    assert torch.equal(read_image(wide.astype(">u2")), read_image(wide))


def test_sixteen_bit_pgm():
    data = b"P5 3 1 65535\n" + struct.pack(">3H", 0, 1000, 65535)
    expected = torch.tensor([0, 1000 / 65535, 1])[None, :, None].expand(1, 3, 3)
    torch.testing.assert_close(read_image(data), expected, atol=1e-6, rtol=0)


def test_float_tiff():
    values = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    image = read_image(encode(PIL.Image.fromarray(values), "TIFF"))
    assert torch.equal(image[..., 1], torch.from_numpy(values))
    with pytest.raises(ImageError, match="divide by 255"):
        read_image(encode(PIL.Image.fromarray(values * 255), "TIFF"))
    values[3, 4] = np.nan
    with pytest.raises(ImageError, match="finite"):
        read_image(encode(PIL.Image.fromarray(values), "TIFF"))


def test_thirty_two_bit_integers_must_fit_sixteen():
    values = np.array([[0, 65535, 257]], np.int32)
    expected = torch.tensor([0, 1, 257 / 65535])
    torch.testing.assert_close(read_image(PIL.Image.fromarray(values))[0, :, 0], expected)
    with pytest.raises(ImageError, match="16 bits"):
        read_image(PIL.Image.fromarray(values * 2))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [PIL.Image.new("RGB", (W, H), color) for color in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    torch.testing.assert_close(read_image(data), torch.tensor([1.0, 0, 0]).expand(H, W, 3), atol=0.02, rtol=0)


def test_a_file_with_a_wrong_suffix_is_read_by_its_content(rgb8, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(PIL.Image.fromarray(rgb8), "PNG"))
    assert torch.equal(read_image(path), as_float(rgb8))


# --- arrays ---------------------------------------------------------------------------------------------


def test_arrays_of_every_dtype_agree(rgb8):
    expected = as_float(rgb8)
    exact = rgb8 / 255
    for source in (rgb8, rgb8.astype(np.uint16) * 257, exact, exact.astype(np.float32), exact.astype(">f8")):
        torch.testing.assert_close(read_image(source), expected, atol=1e-6, rtol=0)
        native = source.astype(source.dtype.newbyteorder("="))
        torch.testing.assert_close(read_image(torch.from_numpy(native)), expected, atol=1e-6, rtol=0)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(read_image(expected.to(dtype)), expected, atol=0.003, rtol=0)


def test_array_layouts(rgb8):
    grey = rgb8[..., 0]
    assert torch.equal(read_image(grey), as_float(grey)[..., None].expand(H, W, 3))
    assert torch.equal(read_image(grey[..., None]), read_image(grey))
    turned = rgb8[::-1, ::-2]
    assert torch.equal(read_image(turned), as_float(np.ascontiguousarray(turned)))
    readonly = rgb8.copy()
    readonly.flags.writeable = False
    assert torch.equal(read_image(readonly), as_float(rgb8))


def test_the_result_owns_its_memory(rgb8):
    as_array = np.random.default_rng(0).random((H, W, 3), np.float32)
    for source in (as_array, torch.from_numpy(as_array.copy()).requires_grad_()):
        before = source.copy() if isinstance(source, np.ndarray) else source.detach().clone()
        image = read_image(source)
        assert not image.requires_grad
        image.zero_()
        now = source if isinstance(source, np.ndarray) else source.detach()
        assert np.array_equal(np.asarray(now), np.asarray(before))


def test_floats_just_outside_the_range_are_clipped():
    image = read_image(np.array([[-0.0009, 1.0009, 0.5]]))
    assert image[0, :, 0].tolist() == [0, 1, 0.5]


@pytest.mark.parametrize(
    ("array", "error", "says"),
    [
        (np.zeros((3, H, W)), ShapeError, "permute"),
        (np.zeros((1, H, W), np.uint8), ShapeError, "permute"),
        (np.zeros((2, H, W, 3)), ShapeError, "one by one"),
        (np.zeros((H, W, 2)), ShapeError, "H, W, 3"),
        (np.zeros(7), ShapeError, "H, W, 3"),
        (np.zeros(()), ShapeError, "H, W, 3"),
        (np.zeros((0, W, 3)), ShapeError, "no pixels"),
        (np.zeros((H, 0)), ShapeError, "no pixels"),
        (np.full((H, W), 200.0), ImageError, "divide by 255"),
        (np.full((H, W), -0.5), ImageError, "Scale it"),
        (np.full((H, W), 1e300), ImageError, "Scale it"),
        (np.full((H, W), np.nan), ImageError, "finite"),
        (np.array([[0.5, -np.inf]]), ImageError, "finite"),
        (np.zeros((H, W), complex), ImageError, "complex128"),
        (np.zeros((H, W), object), ImageError, "object"),
        (np.zeros((H, W), np.int64), ImageError, "int64"),
        (np.zeros((H, W), "U3"), ImageError, "dtype"),
        (np.zeros((H, W), "M8[s]"), ImageError, "dtype"),
        (np.broadcast_to(np.uint8(0), (10**6, 10**6, 3)), ImageError, "million pixels"),
    ],
)
def test_arrays_that_are_no_picture(array, error, says):
    with pytest.raises(error, match=says):
        read_image(array)
    if array.dtype.kind in "fui" and array.size < 10**6:
        with pytest.raises(error, match=says):
            read_image(torch.from_numpy(array))


def test_tensors_that_are_no_picture():
    with pytest.raises(ImageError, match="dense"):
        read_image(torch.zeros(H, W).to_sparse())
    with pytest.raises(ImageError, match="meta"):
        read_image(torch.zeros(H, W, 3, device="meta"))
    with pytest.raises(ImageError):
        read_image(torch.zeros(H, W, 3, dtype=torch.int8))


def test_other_types_are_named():
    with pytest.raises(ImageError, match="NoneType"):
        unchecked(read_image)(None)
    with pytest.raises(ImageError, match="list"):
        unchecked(read_image)([[1, 2]])


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"hello, this is a letter\n", "text"),
        ("Grüße, 你好\n".encode() * 40, "text"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"\0\0\0\x18ftypheic" + bytes(16), "HEIC"),
        (b"PK\x03\x04" + bytes(100), "starts with"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"\xff\xd8\xff", "damaged"),
        (b"BM", "damaged"),
        (b"GIF89a", "damaged"),
        (b"II*\0", "damaged"),
        (b"RIFF\0\0\0\0WEBP", "damaged"),
        (b"P6 10", "damaged"),
        (b"P6 0 5 255\n", "image"),
        (b"BM" + bytes(200), "damaged"),
    ],
)
def test_files_that_are_no_picture(data, says, tmp_path):
    path = tmp_path / "odd name é.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=says):
        read_image(data)
    with pytest.raises(ImageError, match=r"odd name é\.png"):
        read_image(path)


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="addresses are not fetched"):
        read_image("https://example.org/photo.jpg")
    with pytest.raises(ImageError, match="a folder"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="cannot open"):
        read_image("a\0b.png")
    with pytest.raises(ImageError, match="cannot open"):
        read_image("x" * 5000 + ".png")
    with pytest.raises(ImageError, match="device"):
        read_image("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="pipe"):
        read_image(tmp_path / "pipe")


def test_permission_denied(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(b"x")
    if os.geteuid() == 0:  # root reads everything: let the system call say no

        def refuse(*_args, **_kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    else:
        path.chmod(0)
    with pytest.raises(ImageError, match="permission denied"):
        read_image(path)


def test_large_files_are_not_read(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(2**33)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="too large"):
        read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@functools.cache
def png_bomb(width: int, height: int) -> bytes:
    """A valid 1-bit PNG of all zeros: three hundred megabytes of rows in some three hundred kilobytes."""
    packer, rows = zlib.compressobj(9), b"\0" * ((width + 7) // 8 + 1) * 1000
    body = b"".join(packer.compress(rows) for _ in range(height // 1000)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    )


def gif_bomb() -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0)
        + bytes(6)
        + (b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\0;")
    )


def webp_bomb() -> bytes:
    data = bytearray(encode(PIL.Image.new("RGB", (W, H)), "WEBP", lossless=True))
    assert data[12:16] == b"VP8L"
    bits = int.from_bytes(data[21:25], "little")
    data[21:25] = ((bits & ~0xFFFFFFF) | 16382 | (16382 << 14)).to_bytes(4, "little")  # 16383 x 16383
    return bytes(data)


def tiff_tile_bomb() -> bytes:
    """One pixel, stored in a tile of 60000 x 60000 that unpacks from nothing."""
    body = zlib.compress(b"\0" * 10_000_000)
    entries = [(256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1), (322, 60000), (323, 60000)]
    entries += [(324, 8 + 2 + 12 * 10 + 4), (325, len(body))]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", t, 4, 1, v) for t, v in entries
    )
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + body


BOMBS = {
    "png": lambda: png_bomb(50_000, 50_000),
    "bmp": lambda: (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
    "ppm": lambda: b"P6 100000 100000 255\n" + bytes(100),
    "gif": gif_bomb,
    "webp": webp_bomb,
    "tiff tile": tiff_tile_bomb,
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("pillow_limit", [None, 89_478_485])
def test_decompression_bombs_are_refused_unopened(kind, pillow_limit, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", pillow_limit)  # whatever another library set
    data = BOMBS[kind]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="million pixels" if kind != "tiff tile" else "tile|Tile|bomb"):
            read_image(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert pillow_limit == PIL.Image.MAX_IMAGE_PIXELS


def test_max_pixels_is_ours_to_choose(rgb8, monkeypatch):
    data = encode(PIL.Image.fromarray(rgb8), "PNG")
    for source in (data, rgb8, torch.from_numpy(rgb8), PIL.Image.fromarray(rgb8)):
        assert read_image(source, max_pixels=H * W).shape == (H, W, 3)
        with pytest.raises(ImageError, match=f"{W}x{H}"):
            read_image(source, max_pixels=H * W - 1)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)  # does not bind us
    assert torch.equal(read_image(data), as_float(rgb8))
    assert H * W < MAX_PIXELS


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "progressive", "BMP", "PPM", "TIFF", "LZW", "WEBP", "GIF"])
def test_truncated_files_are_refused(kind, fill, monkeypatch):
    monkeypatch.setattr(
        ImageFile, "LOAD_TRUNCATED_IMAGES", fill
    )  # some libraries set it; no grey areas from us
    noise = np.random.default_rng(0).integers(0, 256, (96, 144, 3), np.uint8)
    if kind == "progressive":
        data = encode(PIL.Image.fromarray(noise), "JPEG", progressive=True)
    elif kind == "LZW":
        data = encode(PIL.Image.fromarray(noise), "TIFF", compression="tiff_lzw")
    else:
        data = encode(PIL.Image.fromarray(noise), kind)
    assert read_image(data).shape == (96, 144, 3)
    for cut in (5, 30, 100, len(data) // 10, len(data) // 2, len(data) * 9 // 10, len(data) - 300):
        with pytest.raises(ImageError):
            read_image(data[:cut])


def test_a_broken_checksum_is_refused(rgb8):
    data = bytearray(encode(PIL.Image.fromarray(rgb8), "PNG"))
    data[data.index(b"IDAT") + 40] ^= 1
    with pytest.raises(ImageError):
        read_image(bytes(data))


def test_closed_and_empty_pillow_images(rgb8):
    image = PIL.Image.open(io.BytesIO(encode(PIL.Image.fromarray(rgb8), "PNG")))
    image.close()
    with pytest.raises(ImageError):
        read_image(image)
    with pytest.raises(ImageError, match="0x5"):
        read_image(PIL.Image.new("RGB", (0, 5)))


def seeds() -> list[bytes]:
    noise = np.random.default_rng(1).integers(0, 256, (19, 23, 3), np.uint8)
    image = PIL.Image.fromarray(noise)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    transparent = image.convert("P")
    return [
        encode(image, "PNG", exif=exif),
        cv2.imencode(".png", noise.astype(np.uint16) * 250)[1].tobytes(),
        encode(transparent, "PNG", transparency=3),
        encode(image, "JPEG", exif=exif),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "MPO", save_all=True, append_images=[image]),
        encode(image, "WEBP", lossless=True),
        encode(image, "WEBP", save_all=True, append_images=[image]),
        encode(image, "BMP"),
        encode(transparent, "GIF", transparency=3, save_all=True, append_images=[transparent]),
        encode(image, "TIFF"),
        encode(image, "TIFF", compression="tiff_adobe_deflate", exif=exif),
        encode(image.convert("LAB"), "TIFF"),
        encode(image.convert("F").point(lambda v: v / 255), "TIFF"),
        encode(image, "PPM"),
        b"P2 3 2 65535\n1 2 3\n4 5 60000\n",
    ]


@pytest.mark.parametrize("index", range(17))
@pytest.mark.filterwarnings("ignore")  # Pillow warns about odd metadata
def test_damaged_files_are_read_or_refused(index):
    """Flip, cut, insert and repeat bytes, mostly of the header: an image or an ImageError, nothing else."""
    seed, rng = seeds()[index], random.Random(index)
    outcomes = {"image": 0, "error": 0}
    for _ in range(60):
        data = bytearray(seed)
        for _ in range(rng.choice((1, 2, 5, 20))):
            at = rng.randrange(min(len(data), rng.choice((40, 200, 10**9))))
            action = rng.random()
            if action < 0.6:
                data[at] = rng.choice((0, 1, 127, 128, 255, data[at] ^ (1 << rng.randrange(8))))
            elif action < 0.75:
                data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
            elif action < 0.85:
                del data[at : at + rng.randrange(1, 9)]
            else:
                data[at:at] = data[at : at + rng.randrange(1, 9)]
        try:
            image = read_image(bytes(data), max_pixels=1_000_000)
        except ImageError as error:
            outcomes["error"] += 1
            assert 10 < len(str(error)) < 600
        else:
            outcomes["image"] += 1
            assert_is_image(image)
    assert outcomes["error"] > 0


def test_threads_do_not_disturb_each_other(rgb8):
    good, bad = encode(PIL.Image.fromarray(rgb8), "PNG"), png_bomb(50_000, 2_000 * 2)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(30):
            if not torch.equal(read_image(good), as_float(rgb8)):
                wrong.append("changed")
            try:
                read_image(bad)
                wrong.append("bomb read")
            except ImageError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors_are_the_packages_own():
    with pytest.raises(L2MError) as caught:
        read_image(b"%PDF-1.7")
    message = str(caught.value)
    assert "expected PNG, JPEG" in message and "got a PDF" in message
    assert message.endswith("Save the picture as PNG or JPEG.")


# --- writing and resizing -------------------------------------------------------------------------------


def test_to_uint8_rounds_and_clips():
    values = torch.tensor(
        [-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0, 7.0, torch.inf, -torch.inf]
    )
    image = values[None, :, None].expand(1, 9, 3)
    out = to_uint8(image)
    assert out.dtype == np.uint8 and out.shape == (1, 9, 3)
    assert out[0, :, 1].tolist() == [0, 0, 0, 1, 255, 255, 255, 255, 0]
    with pytest.raises(ImageError, match="NaN"):
        to_uint8(torch.full((2, 3, 3), torch.nan))


def test_every_8_bit_value_survives_the_round_trip(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(8, 32)
    image = read_image(values)
    assert (to_uint8(image)[..., 0] == values).all()
    write_image(tmp_path / "new" / "a.png", image)
    assert torch.equal(read_image(tmp_path / "new" / "a.png"), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_write_jpeg(rgb8, tmp_path):
    smooth = resize_image(as_float(rgb8[..., :2].repeat(2, -1)[..., :3]), (64, 96)) * 0.5
    write_image(tmp_path / "a.JPG", smooth)
    assert (tmp_path / "a.JPG").read_bytes()[:3] == b"\xff\xd8\xff"
    assert (read_image(tmp_path / "a.JPG") - smooth).abs().mean() < 0.01


def test_write_refuses(tmp_path):
    with pytest.raises(ImageError, match="png"):
        write_image(tmp_path / "a.webp", torch.zeros(2, 3, 3))
    for shape in [(3, 4, 5), (4, 5), (0, 5, 3), (1, 4, 5, 3)]:
        with pytest.raises(ShapeError, match="H, W, 3"):
            unchecked(write_image)(tmp_path / "a.png", torch.zeros(shape))
    assert not list(tmp_path.iterdir())


def test_resize_keeps_a_linear_ramp():
    # x -> x / W is linear in continuous pixel coordinates and must stay so, away from the borders
    def ramp(height: int, width: int) -> torch.Tensor:
        x = (torch.arange(width) + 0.5) / width
        y = (torch.arange(height) + 0.5) / height
        return torch.stack(
            [x.expand(height, width), y[:, None].expand(height, width), 0 * x.expand(height, width)], -1
        )

    for hw in [(40, 60), (80, 120), (30, 45), (7, 11)]:
        resized = resize_image(ramp(40, 60), hw)
        assert tuple(resized.shape) == (*hw, 3) and resized.is_contiguous()
        inner = slice(2, -2)
        tol = 1e-5 if hw[0] >= 40 else 1e-3  # a sampled triangle is not quite symmetric: 0.04 px at most
        torch.testing.assert_close(resized[inner, inner], ramp(*hw)[inner, inner], atol=tol, rtol=0)


def test_resize_does_not_alias():
    stripes = (torch.arange(256) % 2).float()[None, :, None].expand(60, 256, 3)
    small = resize_image(stripes, (15, 51))  # without a wide filter this would beat between 0 and 1
    assert (small[:, 2:-2] - 0.5).abs().max() < 0.06
    assert abs(float(small.mean()) - 0.5) < 0.01


def test_resize_keeps_constants_and_range():
    black_and_white = torch.randint(2, (17, 29, 3), generator=torch.Generator().manual_seed(0)).float()
    for hw in [(1, 1), (5, 200), (101, 3)]:
        assert torch.allclose(resize_image(torch.full((17, 29, 3), 0.3), hw), torch.tensor(0.3), atol=1e-6)
        noise = resize_image(black_and_white, hw)
        assert noise.min() >= 0 and noise.max() <= 1
    with pytest.raises(ShapeError):
        resize_image(torch.zeros(4, 5, 3), (0, 5))
    with pytest.raises(ShapeError):
        unchecked(resize_image)(torch.zeros(3, 4, 5), (2, 2))


def test_photos_are_cut_not_squeezed():
    ramp = torch.linspace(0, 1, 200)[None, :, None].expand(100, 200, 3).contiguous()
    square = cut_to(ramp, (50, 50))  # the middle 100 columns at half the size
    expected = (50.5 + 2 * torch.arange(50.0)) / 199
    torch.testing.assert_close(square[25, :, 0], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("hw", "long_side", "expected"),
    [
        ((300, 400), 200, (150, 200)),
        ((400, 300), 200, (200, 150)),
        ((300, 400), 400, (300, 400)),
        ((300, 400), 999, (300, 400)),
        ((2, 900), 90, (1, 90)),
        ((333, 500), 100, (67, 100)),
        ((5, 7), 1, (1, 1)),
    ],
)
def test_fit_long_side(hw, long_side, expected):
    assert tuple(fit_long_side(torch.zeros(*hw, 3), long_side).shape) == (*expected, 3)


def test_fit_long_side_refuses():
    with pytest.raises(ShapeError, match="long_side"):
        fit_long_side(torch.zeros(4, 5, 3), 0)
