"""DINOv2 against the official module's outputs and, where the position embedding is not resized, transformers'."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from l2m_viz.encoders.dinov2 import DinoCfg, DinoViT
from l2m_viz.errors import ShapeError

TINY = DinoCfg(dim=24, depth=2, num_heads=3, patch_size=14, train_side=70)


@pytest.fixture(scope="module")
def tiny():
    """Random weights, the position embedding large enough to be seen."""
    torch.manual_seed(0)
    vit = DinoViT(TINY)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(std=0.3)
    return vit.eval()


@pytest.fixture
def official(golden):
    """A network with the weights of the golden file, and what the file holds."""
    arrays = golden("dinov2")
    meta = json.loads(str(arrays["meta"]))
    vit = DinoViT(
        DinoCfg(meta["embed_dim"], meta["depth"], meta["num_heads"], meta["patch_size"], meta["img_size"])
    ).eval()
    vit.load_state_dict({k[2:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("w.")})
    return vit, arrays


def test_the_official_outputs_on_a_rectangle(official):
    vit, arrays = official
    with torch.no_grad():
        features = vit(torch.from_numpy(arrays["in.image"]))
    assert features.shape == (1, 48, 4, 6)
    tokens = features.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(tokens, arrays["out.tokens"], atol=1e-4, rtol=0)


def test_transformers_agrees_at_the_trained_size(tiny):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=70, patch_size=14, mlp_ratio=4
    )
    theirs = transformers.Dinov2Model(config).eval()
    theirs.load_state_dict(as_transformers_names(tiny.state_dict()))
    images = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state[:, 1:]
        features = tiny(images)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=1e-4)


def as_transformers_names(state):
    renamed = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for i in range(TINY.depth):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        for end in ("weight", "bias"):
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                renamed[f"{theirs}.{name}.{end}"] = state[f"{ours}.{name}.{end}"]
            parts = state[f"{ours}.attn.qkv.{end}"].chunk(3)
            for part, tensor in zip("qkv", parts, strict=True):
                renamed[f"{theirs}.attention.{part}_proj.{end}"] = tensor
            renamed[f"{theirs}.attention.o_proj.{end}"] = state[f"{ours}.attn.proj.{end}"]
        for i_scale in (1, 2):
            renamed[f"{theirs}.layer_scale{i_scale}.lambda1"] = state[f"{ours}.ls{i_scale}.gamma"]
    return renamed


def test_each_image_of_a_batch_is_seen_alone(tiny):
    images = torch.randn(3, 3, 28, 56)
    with torch.no_grad():
        torch.testing.assert_close(
            tiny(images), torch.cat([tiny(image[None]) for image in images]), atol=1e-4, rtol=0
        )


def test_gradients_reach_every_parameter_but_the_mask_token(tiny):
    tiny(torch.randn(1, 3, 28, 42)).square().sum().backward()
    unused = {name for name, parameter in tiny.named_parameters() if parameter.grad is None}
    assert unused == {"mask_token"}
    tiny.zero_grad()


@pytest.mark.parametrize("hw", [(28, 43), (0, 28)])
def test_sides_are_multiples_of_the_patch(tiny, hw, unchecked):
    with pytest.raises(ShapeError, match="multiples of 14"):
        tiny(torch.zeros(1, 3, *hw))


def test_full_size_has_the_official_parameters():
    path = Path(__file__).parents[3] / "shared" / "reference" / "l2mpp_state_dict.json"
    if not path.is_file():
        pytest.skip(f"the official parameter list is not here: {path}")
    official = json.loads(path.read_text())["dinov2_vitl14"]
    with torch.device("meta"):
        state = DinoViT().state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == official


def test_in_bfloat16_it_is_within_two_hundredths_of_the_official_outputs(official):
    vit, arrays = official
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = vit(torch.from_numpy(arrays["in.image"]))
    expected = torch.from_numpy(arrays["out.tokens"])
    assert (features.flatten(2).transpose(1, 2) - expected).norm() / expected.norm() < 2e-2
