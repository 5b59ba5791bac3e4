"""Holes: what each filling shows, that nothing else changes, diffusion with a tiny pipeline through the real code."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from l2m_viz.errors import FileFormatError, ImageError, L2MError, MissingError, ShapeError
from l2m_viz.geometry import Camera, intrinsics, pose_from_rotation
from l2m_viz.lifting import View, inpainting, lift
from l2m_viz.lifting.inpainting import FILL_METHODS, fill_holes

H, W = 40, 62


@pytest.fixture(autouse=True)
def no_networks(monkeypatch, tmp_path):
    """Neither the developer's own weights nor the cache of the hub may answer."""
    monkeypatch.delenv("L2M_MODELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def make_view(image=None, hole_mask=None) -> View:
    """A view with a hole of 10 x 20 px, black inside as renders are."""
    if hole_mask is None:
        hole_mask = torch.zeros(H, W, dtype=torch.bool)
        hole_mask[12:22, 30:50] = True
    if image is None:
        image = 0.2 + 0.6 * torch.rand(H, W, 3, generator=torch.Generator().manual_seed(0))
    camera = Camera(intrinsics(50.0, (H, W)), torch.eye(4), width=W, height=H)
    image = image * ~hole_mask[..., None]
    return View(camera, image, torch.ones(H, W), hole_mask, torch.zeros(H, W, dtype=torch.bool))


def check_only_holes_changed(filled: View, view: View) -> None:
    holes = view.hole_mask
    assert torch.equal(filled.image[~holes], view.image[~holes])
    assert torch.equal(filled.hole_mask, holes)
    assert torch.equal(filled.inpainted_mask, holes)
    assert torch.equal(filled.depth, view.depth)
    assert filled.camera is view.camera
    assert filled.image.shape == view.image.shape
    assert 0 <= filled.image.min() <= filled.image.max() <= 1
    assert (view.image[holes] == 0).all(), "the argument was changed"
    assert not view.inpainted_mask.any(), "the argument was changed"


# --- without networks -------------------------------------------------------------------------------------


def test_none_is_the_view_itself():
    view = make_view()
    assert fill_holes(view, "none") is view


@pytest.mark.parametrize("method", FILL_METHODS)
def test_without_holes_nothing_happens_and_nothing_is_loaded(method):
    view = make_view(hole_mask=torch.zeros(H, W, dtype=torch.bool))
    photo = torch.rand(9, 7, 3) if method == "background" else None
    assert fill_holes(view, method, background=photo) is view


def test_telea_continues_a_plain_surface():
    color = torch.tensor([51, 102, 204]) / 255
    view = make_view(image=color.expand(H, W, 3))
    filled = fill_holes(view, "telea")
    check_only_holes_changed(filled, view)
    torch.testing.assert_close(
        filled.image, color.expand(H, W, 3), atol=4 / 255, rtol=0
    )  # OpenCV rounds down


def test_telea_continues_each_side_of_an_edge():
    image = torch.zeros(H, W, 3)
    image[:17] = torch.tensor(
        [1.0, 0.0, 0.0]
    )  # red above the middle of the hole, blue below: channels stay in order
    image[17:] = torch.tensor([0.0, 0.0, 1.0])
    filled = fill_holes(make_view(image=image), "telea").image
    assert (filled[12, 40, 0] > 0.9) & (filled[12, 40, 2] < 0.1)
    assert (filled[21, 40, 2] > 0.9) & (filled[21, 40, 0] < 0.1)


def test_background_of_the_same_size_shows_through_unchanged():
    photo = torch.rand(H, W, 3, generator=torch.Generator().manual_seed(1))
    view = make_view()
    filled = fill_holes(view, "background", background=photo)
    check_only_holes_changed(filled, view)
    assert torch.equal(filled.image[view.hole_mask], photo[view.hole_mask])


@pytest.mark.parametrize(
    ("height", "width"), [(H, 3 * W), (3 * H, W), (2 * H, 6 * W), (6 * H, 2 * W), (13, 62)]
)
def test_background_is_cropped_to_its_middle_and_covers(height, width):
    """Only the outer thirds are red: none of it may be seen, whatever the aspect."""
    photo = torch.zeros(height, width, 3)
    photo[..., 1] = 1
    outside = torch.tensor([1.0, 0.0, 0.0])
    if width * H > W * height:
        photo[:, : width // 3 - 1] = outside
        photo[:, -(width // 3) + 1 :] = outside
    else:
        photo[: height // 3 - 1] = outside
        photo[-(height // 3) + 1 :] = outside
    everywhere = make_view(hole_mask=torch.ones(H, W, dtype=torch.bool))
    filled = fill_holes(everywhere, "background", background=photo)
    torch.testing.assert_close(filled.image, torch.tensor([0.0, 1.0, 0.0]).expand(H, W, 3))


def test_holes_of_a_real_render():
    image = torch.rand(H, W, 3, generator=torch.Generator().manual_seed(2))
    depth = torch.full((H, W), 2.0)
    depth[10:30, 20:40] = 1.0
    scene = lift(image, depth, intrinsics(50.0, (H, W)))
    aside = Camera(
        scene.K, pose_from_rotation(torch.eye(3), torch.tensor([0.3, 0.0, 0.0])), width=W, height=H
    )
    view = scene.render(aside)
    assert view.hole_mask.any()
    check_only_holes_changed(fill_holes(view, "telea"), view)


def test_what_was_invented_before_stays_marked():
    view = make_view()
    before = torch.zeros(H, W, dtype=torch.bool)
    before[0, 0] = True
    filled = fill_holes(replace(view, inpainted_mask=before), "telea")
    assert torch.equal(filled.inpainted_mask, view.hole_mask | before)


def test_refusals(unchecked):
    view, photo = make_view(), torch.rand(9, 7, 3)
    with pytest.raises(L2MError, match=r'expected one of "none", "telea".* got .magic.'):
        fill_holes(view, "magic")
    with pytest.raises(L2MError, match="expected another photo, got none"):
        fill_holes(view, "background")
    with pytest.raises(L2MError, match=r'expected none but for "background", got \(9, 7, 3\)'):
        fill_holes(view, "telea", background=photo)
    with pytest.raises(ImageError, match="background"):
        fill_holes(view, "background", background=photo * float("nan"))
    with pytest.raises(ShapeError):
        fill_holes(view, "background", background=photo[..., 0])
    with pytest.raises(ImageError, match="fill_holes"):
        fill_holes(replace(view, image=view.image + float("nan")), "telea")
    with pytest.raises(ShapeError, match="one size"):
        fill_holes(replace(view, hole_mask=view.hole_mask.T), "telea")
    with pytest.raises(L2MError, match="at least 1"):
        fill_holes(view, "diffusion", num_steps=0)
    nothing = make_view(hole_mask=torch.ones(H, W, dtype=torch.bool))
    with pytest.raises(L2MError, match="only holes"):
        fill_holes(nothing, "telea")


# --- diffusion --------------------------------------------------------------------------------------------


def tiny_unet(in_channels=9):
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A whole inpainting pipeline of random parts, saved as diffusers saves."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text_config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    vocabulary = {word: i for i, word in enumerate(words)}
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=[8] * 4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
        ),
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24),
        unet=tiny_unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "L2M-Inpainting"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def models(tiny_folder, tmp_path, monkeypatch):
    """A folder of networks with a copy of the tiny pipeline, which is asked for small pictures."""
    monkeypatch.setenv("L2M_MODELS", str(tmp_path))
    monkeypatch.setattr(inpainting, "SHORT_SIDE", 64)
    shutil.copytree(tiny_folder, tmp_path / "L2M-Inpainting")
    return tmp_path


def diffuse(view, seed=0, method="diffusion"):
    return fill_holes(view, method, generator=torch.Generator().manual_seed(seed), num_steps=2)


def test_diffusion_fills_the_holes_and_nothing_else(models):
    view = make_view()
    filled = diffuse(view)
    check_only_holes_changed(filled, view)
    inside = filled.image[view.hole_mask]
    assert inside.std() > 0.01  # it painted something, not black
    assert not filled.image.is_inference()
    assert torch.equal(diffuse(view).image, filled.image)
    assert not torch.equal(diffuse(view, seed=1).image, filled.image)


def test_the_base_network_has_its_own_folder(models):
    with pytest.raises(
        MissingError, match="hf download sd2-community/stable-diffusion-2-inpainting model_index"
    ):
        diffuse(make_view(), method="diffusion-sd2")
    shutil.move(models / "L2M-Inpainting", models / "stable-diffusion-2-inpainting")
    view = make_view()
    check_only_holes_changed(diffuse(view, method="diffusion-sd2"), view)
    with pytest.raises(MissingError, match="hf download Liangyingping/L2M-Inpainting"):
        diffuse(make_view())


@pytest.mark.parametrize(("height", "width", "asked"), [(40, 62, (512, 768)), (62, 40, (768, 512))])
def test_what_the_pipeline_is_asked(monkeypatch, tmp_path, height, width, asked):
    """Short side 512, the photo's aspect in steps of 64; the mask covers every pixel that a hole has a share in."""
    seen = {}

    def pipeline(**kwargs):
        seen.update(kwargs)
        green = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
        return SimpleNamespace(images=green.expand(1, 3, kwargs["height"], kwargs["width"]))

    monkeypatch.setattr(inpainting.NetworkFiles, "find", lambda network: tmp_path)
    monkeypatch.setattr(inpainting, "_load", lambda network, folder: pipeline)
    hole_mask = torch.zeros(height, width, dtype=torch.bool)
    hole_mask[3:20, 5:9] = True
    image = torch.ones(height, width, 3) * ~hole_mask[..., None]
    camera = Camera(intrinsics(50.0, (height, width)), torch.eye(4), width=width, height=height)
    view = View(camera, image, torch.ones(height, width), hole_mask, torch.zeros_like(hole_mask))
    generator = torch.Generator()
    filled = fill_holes(view, "diffusion", generator=generator)

    assert (seen["height"], seen["width"]) == asked
    assert seen["image"].shape == (1, 3, *asked)
    assert seen["mask_image"].shape == (1, 1, *asked)
    assert seen["prompt"] == "a realistic photo"
    assert seen["num_inference_steps"] == 50
    assert seen["generator"] is generator
    shown = seen["image"][0, 0][seen["mask_image"][0, 0] == 0]
    assert (shown > 1 - 1e-2).all()  # no black of the hole beside the mask
    assert (
        abs(seen["mask_image"].mean() / hole_mask.float().mean() - 1) < 0.5
    )  # and not much more than the hole
    torch.testing.assert_close(filled.image[hole_mask], torch.tensor([0.0, 1.0, 0.0]).expand(17 * 4, 3))


def test_offline_says_what_to_run():
    with pytest.raises(MissingError) as caught:
        diffuse(make_view())
    message = str(caught.value)
    assert "hf download Liangyingping/L2M-Inpainting model_index.json scheduler/ tokenizer/" in message
    assert "unet/diffusion_pytorch_model.safetensors" in message
    assert "$L2M_MODELS/L2M-Inpainting" in message


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_without_the_libraries(models, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingError, match=r"pip install 'l2m-viz\[models\]'"):
        diffuse(make_view())


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_damaged_weights(models, part):
    path = models / "L2M-Inpainting" / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match=r"cannot load L2M-Inpainting .*hf download"):
        diffuse(make_view())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_parameter(models, part):
    from safetensors.torch import load_file, save_file

    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    path = models / "L2M-Inpainting" / part / f"{name}.safetensors"
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(FileFormatError, match="1 parameters missing"):
        diffuse(make_view())


def test_pickled_weights_are_not_read(models):
    weights = models / "L2M-Inpainting" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(MissingError, match=r"got no unet/diffusion_pytorch_model\.safetensors"):
        diffuse(make_view())


def test_a_pipeline_that_is_not_for_inpainting(models):
    folder = Path(models / "L2M-Inpainting" / "unet")
    shutil.rmtree(folder)
    tiny_unet(in_channels=4).save_pretrained(folder)
    with pytest.raises(FileFormatError, match="expected 9 input channels, got 4"):
        diffuse(make_view())


def test_a_damaged_tokenizer(models):
    for path in (models / "L2M-Inpainting" / "tokenizer").iterdir():
        path.write_text("{")
    with pytest.raises(FileFormatError, match="cannot load L2M-Inpainting"):
        diffuse(make_view())
