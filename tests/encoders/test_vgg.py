"""VGG19's pyramid against the same layers called one by one, and against the official parameter list."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from l2m_viz.data import load_sample
from l2m_viz.encoders.vgg import VGG19Cfg, VGG19Pyramid

SMALL = VGG19Cfg(widths=(4, 6, 8, 10), depths=(2, 2, 4, 4))


@pytest.fixture(scope="module")
def pyramid():
    torch.manual_seed(0)
    pyramid = VGG19Pyramid(SMALL)
    for layer in pyramid.layers:  # statistics that are not those of a new network
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return pyramid.eval()


def by_hand(state, images):
    """The first levels of VGG19-bn written out: convolve, normalise, cut at zero; keep, halve, go on."""
    index, features, maps = 0, images, {}
    for stride, depth in zip((1, 2, 4, 8), SMALL.depths, strict=True):
        for _ in range(depth):
            conv, norm = f"layers.{index}", f"layers.{index + 1}"
            features = F.conv2d(features, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
            mean, var = (state[f"{norm}.running_{name}"][:, None, None] for name in ("mean", "var"))
            scale, shift = (state[f"{norm}.{name}"][:, None, None] for name in ("weight", "bias"))
            features = ((features - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)
            index += 3
        maps[stride] = features
        features = features.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(-2, -1))
        index += 1
    return maps


def test_levels_are_those_of_the_layers_written_out(pyramid):
    images = torch.rand(2, 3, 24, 40)
    with torch.no_grad():
        maps, expected = pyramid(images), by_hand(pyramid.state_dict(), images)
    assert {stride: tuple(features.shape) for stride, features in maps.items()} == {
        1: (2, 4, 24, 40),
        2: (2, 6, 12, 20),
        4: (2, 8, 6, 10),
        8: (2, 10, 3, 5),
    }
    for stride, features in maps.items():
        torch.testing.assert_close(features, expected[stride], atol=1e-5, rtol=1e-4)
    assert pyramid.channels == {stride: features.shape[1] for stride, features in maps.items()}


def test_gradients_reach_the_image(pyramid):
    images = torch.rand(1, 3, 16, 24, requires_grad=True)
    pyramid(images)[8].square().sum().backward()
    assert images.grad.abs().sum() > 0


def test_full_size_has_the_official_parameters():
    path = Path(__file__).parents[3] / "shared" / "reference" / "l2mpp_state_dict.json"
    if not path.is_file():
        pytest.skip(f"the official parameter list is not here: {path}")
    official = json.loads(path.read_text())["matcher"]
    with torch.device("meta"):
        state = VGG19Pyramid().state_dict()
    ours = {f"encoder.cnn.{key}": list(tensor.shape) for key, tensor in state.items()}
    assert ours == {key: shape for key, shape in official.items() if key.startswith("encoder.cnn.")}


def test_in_bfloat16_it_is_within_two_hundredths():
    """Kaiming's weights, which keep the variance; the growth of rounding errors over 16 layers is theirs."""
    torch.manual_seed(0)
    vgg = VGG19Pyramid(VGG19Cfg()).eval()
    for conv in (module for module in vgg.modules() if isinstance(module, torch.nn.Conv2d)):
        torch.nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    image = load_sample("motorcycle").image_A[:96, :160].permute(2, 0, 1)[None]
    with torch.no_grad():
        exact = vgg(image)
        with torch.autocast("cpu", torch.bfloat16):
            fast = vgg(image)
    for stride, features in exact.items():
        assert (fast[stride] - features).norm() / features.norm() < 2e-2, stride
