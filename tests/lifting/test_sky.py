"""Sky masks: synthetic pictures whose sky is known, and a network of one layer whose answer is a formula."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from l2m_viz.data import load_sample
from l2m_viz.errors import FileFormatError, ImageError, L2MError, MissingError, ShapeError
from l2m_viz.lifting import Depth, mask_sky, sky_mask

H, W = 120, 170
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def no_networks(monkeypatch, tmp_path):
    """Neither the developer's own file nor the cache of the hub may answer."""
    monkeypatch.delenv("L2M_MODELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def landscape(height=H, width=W, top=(0.35, 0.55, 0.9), bottom=(0.75, 0.85, 0.97)):
    """A sky that pales towards a hilly horizon, over rough ground; and where it is."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    sky = y < 0.5 + 0.08 * np.sin(7 * x)
    shade = np.clip(y / 0.6, 0, 1)[..., None]
    above = (
        (1 - shade) * np.array(top)
        + shade * np.array(bottom)
        + generator.normal(0, 0.004, (height, width, 1))
    )
    below = np.array([0.3, 0.4, 0.15]) * generator.uniform(0.4, 1.3, (height, width, 1))
    image = np.where(sky[..., None], above, below).clip(0, 1)
    return torch.from_numpy(image).float(), torch.from_numpy(sky)


def overlap(mask, truth):
    return ((mask & truth).sum() / (mask | truth).sum()).item()


# --- rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(H, W), (W, H), (400, 640), (700, 480)])
def test_a_clear_sky_is_found_up_to_the_horizon(height, width):
    image, truth = landscape(height, width)
    mask = sky_mask(image)
    assert (mask.shape, mask.dtype) == ((height, width), torch.bool)
    assert overlap(mask, truth) > 0.97
    assert (mask & ~truth).sum() < 0.01 * truth.sum()


def test_an_overcast_sky_is_found():
    image, truth = landscape(top=(0.93, 0.93, 0.94), bottom=(0.97, 0.97, 0.97))
    assert overlap(sky_mask(image), truth) > 0.97


def test_a_deep_polarised_sky_is_found():
    image, truth = landscape(top=(0.17, 0.24, 0.42), bottom=(0.3, 0.4, 0.62))
    assert overlap(sky_mask(image), truth) > 0.95


def test_a_cloud_inside_the_sky_is_not_cut_at_its_colour():
    image, truth = landscape()
    y, x = np.mgrid[:H, :W]
    distance = np.hypot((y - 25) / 12, (x - 80) / 25)
    cloud = torch.from_numpy(np.clip(1.5 - distance, 0, 1)).float()[..., None]
    mask = sky_mask(image * (1 - cloud) + 0.97 * cloud)
    assert overlap(mask, truth) > 0.9


@pytest.mark.parametrize(
    ("what", "color"),
    [("a beige wall", (0.75, 0.7, 0.6)), ("a grey wall", (0.6, 0.6, 0.6)), ("leaves", (0.2, 0.5, 0.2))],
)
def test_things_that_are_smooth_and_touch_the_top_are_not_sky(what, color):
    image, _ = landscape(top=color, bottom=color)
    assert not sky_mask(image).any(), what


@pytest.mark.parametrize("columns", [slice(40, 130), slice(0, W)])
def test_a_white_background_goes_on_below_the_thing_and_is_not_sky(columns):
    image = torch.full((H, W, 3), 0.98)
    thing = torch.rand(60, W, 3, generator=torch.Generator().manual_seed(0)) * 0.5
    image[30:90, columns] = thing[:, columns]
    assert not sky_mask(image).any()


def test_water_below_is_not_sky():
    image, truth = landscape()
    assert not sky_mask(image.flip(0)).any()
    assert truth.any()


def test_indoors_has_no_sky():
    for name in ("motorcycle", "coffee"):
        assert not sky_mask(load_sample(name).image_A).any(), name


@pytest.mark.parametrize("hw", [(1, 1), (1, 9), (9, 1), (3, 4), (2000, 5), (4, 900)])
def test_sizes_at_the_edge(hw):
    for image in (
        torch.zeros(*hw, 3),
        torch.ones(*hw, 3),
        torch.rand(*hw, 3),
        torch.tensor([0.3, 0.5, 0.9]).expand(*hw, 3),
    ):
        assert sky_mask(image).shape == hw


# --- depth ------------------------------------------------------------------------------------------------


def depth_map(values, valid=None, kind="relative"):
    valid = torch.ones(H, W, dtype=torch.bool) if valid is None else valid
    return Depth(values, valid, kind, "test")


def test_far_depth_agrees():
    image, truth = landscape()
    depth = torch.where(truth, 100.0, 1 + 5 * torch.rand(H, W))
    assert torch.equal(sky_mask(image, depth), sky_mask(image))
    assert torch.equal(sky_mask(image, depth_map(depth)), sky_mask(image))


def test_what_is_near_is_not_sky():
    image, truth = landscape()
    assert not sky_mask(image, torch.where(truth, 2.0, 50.0)).any()


def test_a_near_part_is_cut_out():
    image, truth = landscape()
    depth = torch.where(truth, 100.0, 5.0)
    depth[:30, :40] = 0.5  # a blue umbrella
    mask = sky_mask(image, depth)
    assert not mask[:30, :40].any()
    assert torch.equal(mask[:, 40:], sky_mask(image)[:, 40:])


def test_metres_know_a_ceiling():
    image, truth = landscape()
    room = torch.where(truth, 6.0, 3.0)
    assert sky_mask(image, depth_map(room)).any()
    assert not sky_mask(image, depth_map(room, kind="metric")).any()


def test_unknown_depth_decides_nothing():
    image, truth = landscape()
    unknown = depth_map(torch.where(truth, 0.1, 5.0), valid=~truth)
    assert torch.equal(sky_mask(image, unknown), sky_mask(image))
    bare = torch.where(truth, float("nan"), 5.0)
    assert torch.equal(sky_mask(image, bare), sky_mask(image))


# --- masking ----------------------------------------------------------------------------------------------


def test_masking_keeps_the_values_and_the_argument():
    values = 1 + torch.rand(H, W)
    valid = torch.rand(H, W) < 0.9
    depth = depth_map(values, valid.clone())
    _, sky = landscape()
    masked = mask_sky(depth, sky)
    assert torch.equal(masked.depth, values)
    assert torch.equal(masked.valid_mask, valid & ~sky)
    assert torch.equal(depth.valid_mask, valid)
    assert (masked.kind, masked.method) == (depth.kind, depth.method)


def test_masking_refuses_to_leave_nothing(unchecked):
    depth = depth_map(torch.ones(H, W))
    with pytest.raises(L2MError, match="not sky"):
        mask_sky(depth, torch.ones(H, W, dtype=torch.bool))
    with pytest.raises(ShapeError, match="one size"):
        mask_sky(depth, torch.ones(W, H, dtype=torch.bool))


def test_refusals(unchecked):
    image, _ = landscape()
    with pytest.raises(L2MError, match='expected one of "offline", "skyseg", got \'magic\''):
        sky_mask(image, method="magic")
    with pytest.raises(ShapeError):
        sky_mask(image.permute(2, 0, 1))
    with pytest.raises(ImageError):
        sky_mask(image * float("nan"))
    with pytest.raises(ImageError):
        sky_mask(image * 255)
    with pytest.raises(ShapeError, match="one size"):
        sky_mask(image, torch.ones(W, H))


# --- skyseg -----------------------------------------------------------------------------------------------


def save_network(path: Path, *, side=320, sigmoid=True, outputs=1, gain=4.0) -> Path:
    """One 1x1 convolution, probability = sigmoid(gain * red of the normalised picture); other outputs deny it."""
    onnx = pytest.importorskip("onnx")
    helper, numbers = onnx.helper, onnx.TensorProto.FLOAT
    weights = {"w": np.array([gain, 0, 0], np.float32), "w_no": np.array([-gain, 0, 0], np.float32)}
    nodes, results = [], []
    for i, name in enumerate(["w", *["w_no"] * (outputs - 1)]):
        nodes.append(helper.make_node("Conv", ["picture", name], [f"logit{i}" if sigmoid else f"out{i}"]))
        if sigmoid:
            nodes.append(helper.make_node("Sigmoid", [f"logit{i}"], [f"out{i}"]))
        results.append(helper.make_tensor_value_info(f"out{i}", numbers, [1, 1, side, side]))
    inputs = [helper.make_tensor_value_info("picture", numbers, [1, 3, side, side])]
    stored = [
        onnx.numpy_helper.from_array(value.reshape(1, 3, 1, 1), name) for name, value in weights.items()
    ]
    graph = helper.make_graph(nodes, "sky", inputs, results, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def skyseg(monkeypatch, tmp_path):
    """Where the network's file has to be."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("L2M_MODELS", str(tmp_path))
    return tmp_path / "skyseg" / "skyseg.onnx"


@pytest.mark.parametrize(("height", "width"), [(H, W), (W, H), (333, 51)])
def test_skyseg_thresholds_the_probability_on_pictures_that_are_not_square(skyseg, height, width):
    save_network(skyseg, outputs=7)
    image = torch.zeros(height, width, 3)
    image[: height // 3, width // 4 :, 0] = 1.0  # red where the network sees sky: asymmetric in both axes
    truth = image[..., 0] > MEAN[0]  # sigmoid(x) > 1/2 where x > 0
    mask = sky_mask(image, method="skyseg")
    rim = torch.zeros_like(truth)
    rim[height // 3 - 2 : height // 3 + 2] = True
    rim[:, width // 4 - 2 : width // 4 + 2] = True
    assert torch.equal(mask[~rim], truth[~rim])


def test_skyseg_normalises_by_imagenet(skyseg):
    save_network(skyseg)
    just = torch.full((H, W, 3), 0.5)
    just[..., 0] = MEAN[0] + 0.01
    assert sky_mask(just, method="skyseg").all()
    just[..., 0] = MEAN[0] - 0.01
    assert not sky_mask(just, method="skyseg").any()


def test_skyseg_invents_no_sky_where_the_network_sees_none(skyseg):
    """The official script stretches probabilities of 2 % to 12 % to 0 to 100 %, and finds sky in every picture."""
    save_network(skyseg, gain=1.0)
    image, _ = landscape()
    image[..., 0] = 0.1 * image[..., 0]
    highest = torch.sigmoid((image[..., 0] - MEAN[0]) / DEVIATION[0])
    assert highest.max() < 0.2 and highest.std() > 0.005
    assert not sky_mask(image, method="skyseg").any()


def test_skyseg_listens_to_depth(skyseg):
    save_network(skyseg)
    image = torch.zeros(H, W, 3)
    image[:40, :, 0] = 1.0
    depth = torch.full((H, W), 5.0)
    depth[:40] = 1.0
    assert not sky_mask(image, depth, method="skyseg").any()


def test_skyseg_offline_says_what_to_run():
    with pytest.raises(
        MissingError, match=r"`hf download JianyuanWang/skyseg skyseg\.onnx` .*\$L2M_MODELS/skyseg"
    ):
        sky_mask(landscape()[0], method="skyseg")


def test_without_onnxruntime(skyseg, monkeypatch):
    save_network(skyseg)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingError, match=r"needs onnxruntime\. Run `pip install 'l2m-viz\[models\]'`"):
        sky_mask(landscape()[0], method="skyseg")


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"<html>" * 50]
)
def test_damaged_files(skyseg, damage):
    data = save_network(skyseg).read_bytes()
    skyseg.write_bytes(damage(data))
    with pytest.raises(FileFormatError, match=r"cannot load skyseg .*hf download"):
        sky_mask(landscape()[0], method="skyseg")


def test_another_network(skyseg):
    save_network(skyseg, side=64)
    with pytest.raises(FileFormatError, match="skyseg"):
        sky_mask(landscape()[0], method="skyseg")


def test_numbers_that_are_no_probabilities(skyseg):
    save_network(skyseg, sigmoid=False)
    with pytest.raises(FileFormatError, match=r"expected 320x320 probabilities in \[0, 1\], got .* from -"):
        sky_mask(landscape()[0], method="skyseg")
