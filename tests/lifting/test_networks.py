"""Networks of others: where they are looked for, what is said when they are absent, Depth Anything on a tiny model."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from l2m_viz.errors import FileFormatError, ImageError, L2MError, MissingError, ShapeError
from l2m_viz.lifting import depth_anything, networks
from l2m_viz.lifting.depth import depth_from_disparity, estimate_depth
from l2m_viz.lifting.depth_anything import FAR_RATIO, disparity_scale, prepared
from l2m_viz.lifting.networks import NetworkFiles, load_once, network_hw

H, W = 30, 44
NETWORK = NetworkFiles("Net", ("new-owner/Net", "old-owner/Net"), ("config.json", "part/weights.safetensors"))
SMALL = "Depth-Anything-V2-Small-hf"


@pytest.fixture(autouse=True)
def no_networks(monkeypatch, tmp_path):
    """Neither the developer's own weights nor the cache of the hub may answer."""
    monkeypatch.delenv("L2M_MODELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A Depth Anything of 15,000 random parameters, saved as transformers saves."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
        patch_size=14,
    )
    model = transformers.DepthAnythingForDepthEstimation(config)
    with torch.no_grad():  # random weights answer 1e-8; the head is scaled until the picture shows
        for name, weight in model.named_parameters():
            if "embeddings.patch" in name or name.startswith(("neck", "head")):
                weight.mul_(8)
        model.head.conv3.bias.fill_(1.0)
    folder = tmp_path_factory.mktemp("models") / SMALL
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def small(tiny_folder, tmp_path, monkeypatch):
    """A copy of the tiny network where estimate_depth finds it, at a tenth of the size that photos are given."""
    monkeypatch.setenv("L2M_MODELS", str(tmp_path))
    monkeypatch.setattr(depth_anything, "SHORT_SIDE", 56)
    return Path(shutil.copytree(tiny_folder, tmp_path / SMALL))


def photo(height=H, width=W, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0).contiguous()


def files_in(folder: Path, names=NETWORK.files) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def in_cache(cache: Path, repo: str) -> Path:
    """The layout of huggingface_hub's cache, written by hand."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123abcd")
    return files_in(root / "snapshots" / "0123abcd")


# --- where the files are ----------------------------------------------------------------------------------


def test_absent_network_names_repository_command_and_folder():
    with pytest.raises(MissingError) as caught:
        NETWORK.find()
    for part in (
        "`hf download new-owner/Net config.json part/weights.safetensors`",
        "$L2M_MODELS/Net",
        "cache of huggingface_hub",
    ):
        assert part in str(caught.value)


def test_own_folder_is_found_and_goes_before_the_cache(tmp_path, monkeypatch):
    cached = in_cache(tmp_path / "hub", "new-owner/Net")
    monkeypatch.setenv("L2M_MODELS", str(tmp_path / "own"))
    assert NETWORK.find() == cached  # the folder is set, but this network is not in it
    own = files_in(tmp_path / "own" / "Net")
    assert NETWORK.find() == own


@pytest.mark.parametrize("repo", ["new-owner/Net", "old-owner/Net"])
def test_cache_of_the_hub_is_found_under_old_names_too(tmp_path, repo):
    folder = in_cache(tmp_path / "hub", repo)
    assert NETWORK.find() == folder


def test_a_nested_first_file_leads_to_the_top_of_the_snapshot(tmp_path):
    nested = NetworkFiles("Net", ("new-owner/Net",), ("part/weights.safetensors", "config.json"))
    folder = in_cache(tmp_path / "hub", "new-owner/Net")
    assert nested.find() == folder


def test_incomplete_folder_names_the_missing_file(tmp_path, monkeypatch):
    monkeypatch.setenv("L2M_MODELS", str(tmp_path))
    files_in(tmp_path / "Net")
    (tmp_path / "Net" / "part" / "weights.safetensors").unlink()
    with pytest.raises(MissingError, match=r"got no part/weights\.safetensors\. .*--local-dir .*Net"):
        NETWORK.find()


def test_a_name_with_a_slash_is_a_folder_with_something_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("L2M_MODELS", str(tmp_path))
    network = NetworkFiles("Net", ("owner/Net",), ("config.json", "tokenizer/"))
    files_in(tmp_path / "Net", ["config.json"])
    (tmp_path / "Net" / "tokenizer").mkdir()
    with pytest.raises(MissingError, match="got no tokenizer/"):
        network.find()
    files_in(tmp_path / "Net", ["tokenizer/vocab.json"])
    assert network.find() == tmp_path / "Net"


def test_without_huggingface_hub_there_is_no_cache_and_no_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingError, match="hf download"):
        NETWORK.find()


def test_a_network_is_loaded_once_and_errors_are_not_kept(tmp_path):
    calls = []

    @load_once
    def load(network, folder):
        calls.append(folder)
        if len(calls) == 1:
            raise RuntimeError("disk on fire. ")
        return object()

    with pytest.raises(FileFormatError, match=r"cannot load Net .*RuntimeError: disk on fire\. The files"):
        load(NETWORK, tmp_path)
    assert load(NETWORK, tmp_path) is load(NETWORK, tmp_path)
    assert len(calls) == 2


def test_what_is_missing_in_a_library_is_not_called_damage(tmp_path):
    @load_once
    def load(network, folder):
        raise ImportError("needs another library")

    with pytest.raises(MissingError, match=r"pip install 'l2m-viz\[models\]'"):
        load(NETWORK, tmp_path)


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hw", "expected"),
    [
        ((480, 640), (518, 686)),  # 640 * 518 / 480 = 690.7 = 49.3 patches
        ((640, 480), (686, 518)),
        ((320, 480), (518, 784)),  # enlarged: 777 = 55.5 patches, rounded to the even number
        ((1080, 1920), (518, 924)),
        ((7, 7), (518, 518)),
        ((100, 400), (518, 2072)),  # an aspect of 4
        (
            (100, 1600),
            (252, 4144),
        ),  # longer: as many pixels as that one, 259 = 18.5 patches, the even number again
        ((1, 100_000), (14, 76_664)),  # 14 times as many pixels, were the aspect kept: at most 4 * 518^2
    ],
)
def test_sizes_that_networks_get(hw, expected):
    assert network_hw(hw, 518, 14) == expected


def test_photos_are_prepared_as_transformers_does_where_both_fit_the_short_side():
    dpt = pytest.importorskip("transformers.models.dpt.image_processing_pil_dpt")
    processor = dpt.DPTImageProcessorPil(
        size={"height": 518, "width": 518},
        ensure_multiple_of=14,
        keep_aspect_ratio=True,
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    eight_bits = (photo(600, 820) * 255).round().to(torch.uint8)
    theirs = processor(eight_bits.numpy(), return_tensors="pt", input_data_format="channels_last")
    ours = prepared(eight_bits.float() / 255)
    assert ours.shape == theirs["pixel_values"].shape == (1, 3, 518, 714)
    assert (ours - theirs["pixel_values"]).abs().max() < 1.5 / 255 / 0.224  # they round to 8 bits on the way


# --- disparity to depth -----------------------------------------------------------------------------------


def depth_of(disparity):
    scale, shift = disparity_scale(disparity)
    return depth_from_disparity(disparity, scale=scale, shift=shift)


def test_disparity_becomes_depth_from_one_to_the_far_ratio():
    disparity = torch.linspace(3.0, 7.0, H * W).reshape(H, W)
    depth = depth_of(disparity)
    assert depth.valid_mask.all()
    near = float(np.percentile(disparity.numpy(), 99.9))
    expected = 1 / (1 / FAR_RATIO + (1 - 1 / FAR_RATIO) * (disparity.double() - 3) / (near - 3))
    torch.testing.assert_close(depth.depth.double(), expected, rtol=1e-5, atol=0)
    assert depth.depth.max().item() == pytest.approx(FAR_RATIO, rel=1e-4)


def test_disparity_has_no_unit_and_no_zero():
    disparity = photo()[..., 0]
    torch.testing.assert_close(
        depth_of(disparity).depth, depth_of(250 * disparity + 40).depth, rtol=1e-3, atol=0
    )


def test_one_wild_pixel_does_not_push_the_rest_away():
    disparity = photo(100, 140)[..., 0]
    wild = disparity.clone()
    wild[3, 5] = 1e6
    elsewhere = torch.ones(100, 140, dtype=torch.bool)
    elsewhere[3, 5] = False
    torch.testing.assert_close(
        depth_of(wild).depth[elsewhere], depth_of(disparity).depth[elsewhere], rtol=0.05, atol=0
    )


@pytest.mark.parametrize("value", [0.0, 1e-3, 12.0])
def test_constant_disparity_is_a_plane_at_depth_one(value):
    torch.testing.assert_close(depth_of(torch.full((H, W), value)).depth, torch.ones(H, W))


# --- Depth Anything, real code on a tiny model ------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(H, W), (W, H)])
def test_estimate_depth_by_a_network(small, height, width):
    import transformers

    image = photo(height, width)
    depth = estimate_depth(image, "depth-anything-v2-small", K=torch.eye(3), generator=torch.Generator())
    assert (depth.hw, depth.kind, depth.method) == ((height, width), "relative", "depth-anything-v2-small")
    assert depth.valid_mask.all()

    model = transformers.DepthAnythingForDepthEstimation.from_pretrained(small).eval()
    with torch.no_grad():
        raw = model(pixel_values=prepared(image)).predicted_depth  # [1 56 84] or [1 84 56]
    assert raw.shape[1:] == ((56, 84) if height < width else (84, 56))
    disparity = F.interpolate(raw[None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    assert disparity.std() > 1e-3  # the tiny network says something
    torch.testing.assert_close(depth.depth, depth_of(disparity).depth, rtol=1e-4, atol=0)
    assert not depth.depth.is_inference()


def test_the_network_stays_in_memory(small, monkeypatch):
    estimate_depth(photo(), "depth-anything-v2-small")
    monkeypatch.setattr(networks, "load_complete", None)
    monkeypatch.setattr(depth_anything, "load_complete", None)
    estimate_depth(photo(seed=1), "depth-anything-v2-small")


@pytest.mark.parametrize("variant", ["small", "base", "large"])
def test_offline_without_weights_says_what_to_run(variant):
    with pytest.raises(MissingError) as caught:
        estimate_depth(photo(), f"depth-anything-v2-{variant}")
    name = f"Depth-Anything-V2-{variant.capitalize()}-hf"
    assert f"hf download depth-anything/{name} config.json model.safetensors" in str(caught.value)
    assert f"$L2M_MODELS/{name}" in str(caught.value)


def test_pickled_weights_are_not_read(small):
    (small / "model.safetensors").rename(small / "pytorch_model.bin")
    with pytest.raises(MissingError, match=r"got no model\.safetensors"):
        estimate_depth(photo(), "depth-anything-v2-small")


def test_without_transformers(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingError, match=r"needs transformers\. Run `pip install 'l2m-viz\[models\]'`"):
        estimate_depth(photo(), "depth-anything-v2-small")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights(small, share):
    data = (small / "model.safetensors").read_bytes()
    (small / "model.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(FileFormatError, match=rf"cannot load {SMALL} .*hf download .*--local-dir"):
        estimate_depth(photo(), "depth-anything-v2-small")


def test_damaged_config(small):
    (small / "config.json").write_text('{"model_type": "depth_any')
    with pytest.raises(FileFormatError, match=f"cannot load {SMALL}"):
        estimate_depth(photo(), "depth-anything-v2-small")


def test_weights_that_lack_a_parameter_are_not_filled_with_random_ones(small):
    from safetensors.torch import load_file, save_file

    weights = load_file(small / "model.safetensors")
    mask_token = "backbone.embeddings.mask_token"  # for training only: conversions may drop it
    save_file(
        {k: v for k, v in weights.items() if k != mask_token}, small / "model.safetensors", {"format": "pt"}
    )
    estimate_depth(photo(), "depth-anything-v2-small")
    other = Path(shutil.copytree(small, small.with_name("Depth-Anything-V2-Base-hf")))
    save_file(
        {k: v for k, v in weights.items() if "conv3" not in k}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(FileFormatError, match="2 parameters missing"):
        estimate_depth(photo(), "depth-anything-v2-base")


def test_weights_that_answer_nan(small):
    from safetensors.torch import load_file, save_file

    weights = load_file(small / "model.safetensors")
    weights["head.conv3.bias"].fill_(float("nan"))
    save_file(weights, small / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileFormatError, match="answers NaN"):
        estimate_depth(photo(), "depth-anything-v2-small")


def test_pictures_that_are_none(unchecked):
    bad = photo()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(ImageError):
        estimate_depth(bad, "depth-anything-v2-small")
    with pytest.raises(ShapeError):
        estimate_depth(torch.rand(3, H, W), "depth-anything-v2-small")
    with pytest.raises(L2MError, match='"depth-anything-v2-small"'):
        estimate_depth(photo(), "depth-anything-v2-giant")
