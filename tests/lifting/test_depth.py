"""Depth: what a result may hold, disparity in closed form, files good and bad."""

import io
import re
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image

from l2m_viz.errors import FileFormatError, L2MError, MissingError, ShapeError
from l2m_viz.geometry import (
    Camera,
    intrinsics,
    normalized_grid,
    plane_homography,
    pose_from_rotation,
    rotation_from_axis_angle,
    to_pixel,
)
from l2m_viz.lifting import depth as depth_module, lift, warp_from_depth
from l2m_viz.lifting.depth import (
    DEPTH_RANGE,
    Depth,
    as_depth,
    depth_from_disparity,
    estimate_depth,
    read_depth,
)

H, W = 5, 7
METRES = np.linspace(0.5, 4.0, H * W).reshape(H, W)


def make_depth(**changes) -> Depth:
    fields = {
        "depth": torch.full((H, W), 2.0),
        "valid_mask": torch.ones(H, W, dtype=torch.bool),
        "kind": "metric",
        "method": "file",
    }
    return Depth(**{**fields, **changes})


# --- Depth ------------------------------------------------------------------------------------------------


def test_depth_survives_save_and_load(tmp_path):
    valid = torch.ones(H, W, dtype=torch.bool)
    valid[1, 2] = False
    depth = make_depth(depth=torch.from_numpy(METRES).float(), valid_mask=valid)
    depth.save(tmp_path / "depth.npz")
    for loaded in (Depth.load(tmp_path / "depth.npz"), read_depth(tmp_path / "depth.npz")):
        assert torch.equal(loaded.depth, depth.depth)
        assert torch.equal(loaded.valid_mask, valid)
        assert (loaded.kind, loaded.method, loaded.hw) == ("metric", "file", (H, W))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"depth": torch.ones(H, W + 1)}, ShapeError, "one shape"),
        ({"depth": torch.ones(1, H, W), "valid_mask": torch.ones(1, H, W).bool()}, ShapeError, "one shape"),
        ({"depth": torch.ones(0, W), "valid_mask": torch.ones(0, W).bool()}, ShapeError, "one shape"),
        ({"depth": torch.ones(H, W).double()}, ShapeError, "float32"),
        ({"valid_mask": torch.ones(H, W)}, ShapeError, "bool mask"),
        ({"valid_mask": torch.zeros(H, W).bool()}, L2MError, "0 of 35"),
        ({"depth": torch.zeros(H, W)}, L2MError, "35 valid pixels that are not"),
        ({"depth": torch.full((H, W), -1.0)}, L2MError, "Mask them out"),
        ({"depth": torch.full((H, W), float("nan"))}, L2MError, "valid pixels that are not"),
        ({"kind": "absolute"}, L2MError, "metric"),
    ],
)
def test_depth_refuses_what_it_cannot_mean(changes, error, says):
    with pytest.raises(
        (error, TypeCheckError)
    ) as caught:  # where annotations are checked, that may come first
        make_depth(**changes)
    assert isinstance(caught.value, TypeCheckError) or re.search(says, str(caught.value))


def test_depth_refuses_nan_where_invalid():
    depth, valid = torch.ones(H, W), torch.ones(H, W, dtype=torch.bool)
    depth[0, 0], valid[0, 0] = float("nan"), False
    with pytest.raises(L2MError, match="invalid pixels too"):
        make_depth(depth=depth, valid_mask=valid)
    depth[0, 0] = -3.0  # finite: it means nothing, and that is fine
    assert not make_depth(depth=depth, valid_mask=valid).valid_mask[0, 0]


def test_as_depth_turns_unusable_values_into_invalid_ones():
    values = torch.tensor([[2.0, 0.0, -1.0], [float("nan"), float("inf"), 3.0]])
    depth = as_depth(values)
    assert depth.valid_mask.tolist() == [[True, False, False], [False, False, True]]
    assert as_depth(depth) is depth


# --- disparity --------------------------------------------------------------------------------------------


def test_depth_from_disparity_is_the_closed_form():
    disparity = torch.tensor([[0.0, 0.25, 1.0], [2.0, 4.0, 10.0]])
    result = depth_from_disparity(disparity, scale=0.5, shift=0.125)
    expected = 1 / (0.5 * disparity.double() + 0.125)
    torch.testing.assert_close(result.depth.double(), expected, rtol=1e-7, atol=0)
    assert result.valid_mask.all()
    assert result.kind == "relative"


def test_depth_from_disparity_marks_what_has_no_depth():
    disparity = torch.tensor([[1.0, 0.0, -2.0, float("nan"), float("inf"), float("-inf")]])
    result = depth_from_disparity(disparity)
    assert result.valid_mask.tolist() == [[True, False, False, False, False, False]]
    assert torch.isfinite(result.depth).all()
    reversed_sign = depth_from_disparity(disparity, scale=-1.0, shift=0.5)
    assert reversed_sign.valid_mask.tolist() == [[False, True, True, False, False, False]]
    torch.testing.assert_close(reversed_sign.depth[0, 1:3], torch.tensor([2.0, 0.4]))


def test_depth_from_disparity_clips_to_its_range_and_nowhere_else():
    near, far = DEPTH_RANGE
    result = depth_from_disparity(torch.tensor([[1e9, 1e-9, 1 / 7]]))
    torch.testing.assert_close(result.depth, torch.tensor([[near, far, 7.0]]), rtol=1e-6, atol=0)
    assert result.valid_mask.all()
    narrow = depth_from_disparity(torch.tensor([[10.0, 0.01]]), depth_range=(0.5, 2.0))
    assert narrow.depth.tolist() == [[0.5, 2.0]]


def test_disparity_keeps_ratios_of_depth_when_scaled():
    disparity = torch.rand(H, W, generator=torch.Generator().manual_seed(0)) + 0.1
    one, ten = depth_from_disparity(disparity), depth_from_disparity(disparity, scale=10.0)
    torch.testing.assert_close(one.depth, 10 * ten.depth)


@pytest.mark.parametrize(
    "wrong",
    [{"scale": 0.0}, {"scale": float("nan")}, {"shift": float("inf")}, {"depth_range": (2.0, 1.0)}],
)
def test_depth_from_disparity_refuses_parameters_without_meaning(wrong):
    with pytest.raises(L2MError):
        depth_from_disparity(torch.ones(H, W), **wrong)


def test_depth_from_disparity_refuses_when_nothing_is_left():
    with pytest.raises(L2MError, match="0 of 35"):
        depth_from_disparity(torch.zeros(H, W))


# --- estimators -------------------------------------------------------------------------------------------


def test_estimate_depth_by_the_prior():
    image = torch.rand(24, 33, 3, generator=torch.Generator().manual_seed(1))
    depth = estimate_depth(image)
    assert (depth.hw, depth.kind, depth.method) == ((24, 33), "relative", "prior")
    assert depth.valid_mask.all()
    assert torch.equal(depth.depth, estimate_depth(image, generator=torch.Generator().manual_seed(7)).depth)


def test_estimate_depth_names_the_methods_it_knows():
    with pytest.raises(L2MError, match=r"expected one of .*depth-anything-v2-small.*prior.*, got 'midas'"):
        estimate_depth(torch.rand(4, 6, 3), method="midas")


# --- files: good ones -------------------------------------------------------------------------------------


def test_png16_in_millimetres(tmp_path):
    millimetres = np.round(METRES * 1000).astype(np.uint16)
    millimetres[0, 0] = 0
    assert cv2.imwrite(str(tmp_path / "depth.png"), millimetres)
    depth = read_depth(tmp_path / "depth.png", scale=0.001)
    assert depth.kind == "metric"
    assert depth.valid_mask.sum() == H * W - 1
    assert not depth.valid_mask[0, 0]
    expected = torch.from_numpy(millimetres / 1000).float()
    torch.testing.assert_close(depth.depth[depth.valid_mask], expected[depth.valid_mask])
    assert torch.isfinite(depth.depth).all()


def test_png8_disparity(tmp_path):
    pixels = np.full((H, W), 50, np.uint8)
    pixels[2, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "disparity.PNG")
    depth = read_depth(tmp_path / "disparity.PNG", kind="disparity", scale=1 / 100, shift=0.5)
    assert depth.kind == "relative"
    assert not depth.valid_mask[2, 3]  # an integer 0 is unknown, in spite of the shift
    torch.testing.assert_close(depth.depth[depth.valid_mask], torch.ones(H * W - 1))


def test_measured_depth_in_millimetres():
    root = Path(__file__).parents[2].parent / "shared" / "data" / "eval"
    if not root.is_dir():
        pytest.skip(f"no development data at {root}")
    depth = read_depth(root / "rgbd" / "depth_1.png", scale=0.001)
    assert depth.hw == (480, 640)
    assert 0.3 < depth.depth[depth.valid_mask].median() < 10


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int32, np.uint8])
def test_npy_of_any_number_type(tmp_path, dtype):
    np.save(tmp_path / "depth.npy", np.ceil(METRES).astype(dtype))
    depth = read_depth(tmp_path / "depth.npy", scale=2.0, shift=0.5)
    torch.testing.assert_close(depth.depth, torch.from_numpy(np.ceil(METRES) * 2 + 0.5).float())


def test_npy_fortran_order_keeps_rows_and_columns(tmp_path):
    np.save(tmp_path / "depth.npy", np.asfortranarray(METRES))
    torch.testing.assert_close(read_depth(tmp_path / "depth.npy").depth, torch.from_numpy(METRES).float())


def test_float_zero_is_unknown_depth_but_far_disparity(tmp_path):
    values = METRES.astype(np.float32)
    values[0, :3] = (0.0, np.nan, np.inf)
    np.save(tmp_path / "map.npy", values)
    assert read_depth(tmp_path / "map.npy", shift=1.0).valid_mask[0, :4].tolist() == [
        False,
        False,
        False,
        True,
    ]
    disparity = read_depth(tmp_path / "map.npy", kind="disparity", shift=0.25)
    assert disparity.valid_mask[0, :4].tolist() == [True, False, False, True]
    assert disparity.depth[0, 0] == 4.0


def test_npz_with_one_array_or_a_named_one(tmp_path):
    np.savez(tmp_path / "one.npz", anything=METRES)
    np.savez_compressed(tmp_path / "two.npz", depth=METRES, disparity=1 / METRES, K=np.eye(3))
    expected = torch.from_numpy(METRES).float()
    torch.testing.assert_close(read_depth(tmp_path / "one.npz").depth, expected)
    torch.testing.assert_close(read_depth(tmp_path / "two.npz").depth, expected)
    torch.testing.assert_close(read_depth(tmp_path / "two.npz", kind="disparity").depth, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_tiff(tmp_path, dtype):
    Image.fromarray(np.ceil(METRES).astype(dtype)).save(tmp_path / "depth.tif")
    torch.testing.assert_close(
        read_depth(tmp_path / "depth.tif").depth, torch.from_numpy(np.ceil(METRES)).float()
    )


# --- files: bad ones --------------------------------------------------------------------------------------


def refused(path: Path, says: str, **kwargs) -> None:
    with pytest.raises(FileFormatError, match=says):
        read_depth(path, **kwargs)


def good_bytes(suffix: str) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(1, 60000, (40, 50)).astype(np.uint16)
    if suffix == ".npy":
        np.save(buffer, values)
    elif suffix == ".npz":
        np.savez_compressed(buffer, depth=values)
    else:
        Image.fromarray(values).save(buffer, "PNG" if suffix == ".png" else "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png", ".tif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    data, path = good_bytes(suffix), tmp_path / f"depth{suffix}"
    path.write_bytes(data)
    assert read_depth(path).hw == (40, 50)
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "cannot read .*depth")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png", ".tif"])
def test_damaged_bytes_never_raise_anything_else(tmp_path, suffix):
    data, path = bytearray(good_bytes(suffix)), tmp_path / f"depth{suffix}"
    generator = np.random.default_rng(3)
    for _ in range(60):
        damaged = data.copy()
        for position in generator.integers(0, min(len(data), 600), 4):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_depth(path).valid_mask.any()
        except FileFormatError as error:
            assert "depth" in str(error)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png", ".tif"])
def test_foreign_files(tmp_path, suffix):
    path = tmp_path / f"depth{suffix}"
    Image.new("L", (W, H)).save(path, "JPEG")
    refused(path, "cannot read")
    path.write_text("not depth at all")
    refused(path, "cannot read")


def test_pickles_are_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.save(tmp_path / "depth.npy", np.array([[Bomb()]]), allow_pickle=True)
    np.savez(tmp_path / "depth.npz", depth=np.array([[Bomb()]]))
    refused(tmp_path / "depth.npy", "expected an array of numbers, got dtype object")
    refused(tmp_path / "depth.npz", "expected an array of numbers, got dtype object")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shape", [(H,), (H, W, 3), (1, H, W), (0, W), ()])
def test_wrong_shapes(tmp_path, shape):
    np.save(tmp_path / "depth.npy", np.ones(shape))
    refused(tmp_path / "depth.npy", re.escape(f"expected one map (H, W), got shape {shape}"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "1"])
def test_pictures_of_depth_are_not_depth(tmp_path, mode):
    Image.new(mode, (W, H)).save(tmp_path / "depth.png")
    refused(tmp_path / "depth.png", f"one grey channel, got mode {mode}")


def test_files_without_a_valid_pixel(tmp_path):
    Image.fromarray(np.zeros((H, W), np.uint16)).save(tmp_path / "zero.png")
    np.save(tmp_path / "nan.npy", np.full((H, W), np.nan))
    np.save(tmp_path / "negative.npy", -METRES)
    for name in ("zero.png", "nan.npy", "negative.npy"):
        for kind in ("depth", "disparity"):
            refused(tmp_path / name, f'0 of 35.*Check kind="{kind}"', kind=kind)


def test_headers_that_promise_too_much_are_refused_before_decoding(tmp_path, monkeypatch):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    (tmp_path / "depth.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "depth.npz", "w") as archive:
        archive.writestr("depth.npy", header.getvalue())
    refused(tmp_path / "depth.npy", "too large")
    refused(tmp_path / "depth.npz", "too large")
    monkeypatch.setattr(depth_module, "MAX_PIXELS", H * W - 1)
    for suffix in (".png", ".tif"):
        Image.fromarray(np.ones((H, W), np.uint16)).save(tmp_path / f"depth{suffix}")
        refused(tmp_path / f"depth{suffix}", "too large: expected at most 34 pixels, got 7x5")
    monkeypatch.setattr(depth_module, "_MAX_BYTES", 10)
    refused(tmp_path / "depth.png", "too large")
    monkeypatch.setattr(depth_module, "_MAX_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__meta__.npy", bytes(2 * 10**6))
    refused(tmp_path / "bomb.npz", "too large")


def test_names_and_arguments_that_cannot_be_used(tmp_path):
    refused(tmp_path / "absent.png", "no such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "depth.txt").write_text("1 2 3")
    refused(tmp_path / "depth.txt", r"expected one of \.npy")
    np.savez(tmp_path / "two.npz", a=METRES, b=METRES)
    refused(tmp_path / "two.npz", 'expected one array, or one named "depth"')
    np.save(tmp_path / "depth.npy", METRES)
    with pytest.raises(L2MError, match="scale not 0"):
        read_depth(tmp_path / "depth.npy", scale=0.0)
    make_depth().save(tmp_path / "saved.npz")
    refused(tmp_path / "saved.npz", "is a saved Depth", scale=0.001)


def test_a_saved_result_of_another_kind(tmp_path):
    depth_module.Saved.save(make_depth(), tmp_path / "depth.npz")
    with np.load(tmp_path / "depth.npz") as archive:
        arrays = dict(archive)
    arrays["depth"][:] = np.nan
    np.savez(tmp_path / "depth.npz", **arrays)
    refused(tmp_path / "depth.npz", "no usable depth|cannot load")


def test_exr_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "depth.exr").write_bytes(b"\x76\x2f\x31\x01")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  OpenEXR:   NO")
    with pytest.raises(MissingError, match="built without OpenEXR"):
        read_depth(tmp_path / "depth.exr")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  OpenEXR:   build (ver 2.3.0)")
    monkeypatch.delenv("OPENCV_IO_ENABLE_OPENEXR", raising=False)
    with pytest.raises(MissingError, match="OPENCV_IO_ENABLE_OPENEXR=1"):
        read_depth(tmp_path / "depth.exr")
    monkeypatch.setenv("OPENCV_IO_ENABLE_OPENEXR", "1")
    monkeypatch.setattr(cv2, "imread", lambda *_: None)
    refused(tmp_path / "depth.exr", "expected an EXR file")
    monkeypatch.setattr(cv2, "imread", lambda *_: METRES.astype(np.float32))
    assert read_depth(tmp_path / "depth.exr").hw == (H, W)


def test_flat_depth_makes_every_view_a_homography():
    image = torch.rand(24, 32, 3, generator=torch.Generator().manual_seed(0))
    K = intrinsics(30.0, (24, 32))
    scene = lift(image, estimate_depth(image, "flat"), K)
    pose = pose_from_rotation(
        rotation_from_axis_angle(torch.tensor([0.05, -0.1, 0.2])), torch.tensor([0.1, 0, 0.1])
    )
    view = scene.render(Camera(K, pose, width=32, height=24))
    warp, seen = warp_from_depth(view.depth, K, scene.depth, K, torch.linalg.inv(pose), ~view.hole_mask)
    homography = torch.linalg.inv(plane_homography(K, K, pose, torch.tensor([0.0, 0.0, 1.0]), 1.0))
    at = to_pixel(normalized_grid((24, 32)), (24, 32))
    mapped = torch.cat([at, torch.ones(24, 32, 1)], dim=-1) @ homography.T
    expected = mapped[..., :2] / mapped[..., 2:]
    assert seen.float().mean() > 0.5
    torch.testing.assert_close(to_pixel(warp, (24, 32))[seen], expected[seen], atol=2e-3, rtol=0)
