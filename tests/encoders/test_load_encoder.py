"""Encoders from files: VGG19 and DINOv2 through the real loading code, with random weights that the test writes."""

import pytest
import torch

from l2m_viz.data import load_sample
from l2m_viz.encoders import load_encoder
from l2m_viz.encoders.dinov2 import DINOV2_VITS14, DinoViT
from l2m_viz.encoders.vgg import VGG19Pyramid
from l2m_viz.errors import FileFormatError, L2MError, MissingError


@pytest.fixture(autouse=True)
def no_published_weights(monkeypatch, tmp_path):
    """Neither the developer's own weights nor his caches may answer."""
    monkeypatch.delenv("L2M_MODELS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def photo():
    return load_sample("coffee").image_A[100:156, 200:284].contiguous()  # 56x84, multiples of 14


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """What torchvision publishes: `features` of 52 layers, a classifier, and no counters of training steps."""
    torch.manual_seed(0)
    features = {
        f"features.{key.removeprefix('layers.')}": tensor
        for key, tensor in VGG19Pyramid().state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    beyond = {"features.40.weight": torch.zeros(4, 4, 3, 3), "classifier.0.weight": torch.zeros(2, 4)}
    path = tmp_path_factory.mktemp("weights") / "vgg19_bn.pth"
    torch.save(features | beyond, path)
    return path


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "vits14.pth"
    torch.save(DinoViT(DINOV2_VITS14).state_dict(), path)
    return path


def test_vgg_is_torchvisions_with_the_image_normalised(photo, vgg_file):
    encoder = load_encoder("vgg19-bn", vgg_file, device="cpu")
    assert (encoder.name, encoder.stride, encoder.dim) == ("vgg19-bn", 8, 512)
    features = encoder(photo)
    assert features.shape == (7, 11, 512)  # 84 px are resized to 88
    weights = torch.load(vgg_file, weights_only=True)
    network = VGG19Pyramid().eval()
    for key, tensor in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            tensor.copy_(weights[key.replace("layers.", "features.")])
    whole = photo[:, :80]  # a multiple of 8: no resizing
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((whole - mean) / deviation).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = network(images)[8][0].permute(1, 2, 0)
    torch.testing.assert_close(encoder(whole), expected, atol=1e-4, rtol=1e-3)


def test_dinov2_cells_tile_the_image(photo, dino_file):
    encoder = load_encoder("dinov2-vits14", dino_file, device="cpu")
    assert (encoder.name, encoder.stride, encoder.dim) == ("dinov2-vits14", 14, 384)
    features = encoder(photo)
    assert features.shape == (4, 6, 384)
    assert encoder(photo[:50, :71]).shape == (4, 6, 384)  # resized up to the next multiples
    # a disturbance in one patch changes that cell most
    disturbed = photo.clone()
    disturbed[14:28, 42:56] = 1 - disturbed[14:28, 42:56]
    change = (encoder(disturbed) - features).norm(dim=-1)
    assert divmod(int(change.argmax()), 6) == (1, 3)


def test_weights_of_another_size_are_refused_by_name(dino_file, unchecked):
    with pytest.raises(FileFormatError, match=r"cls_token \(1, 1, 384\) instead of \(1, 1, 768\)"):
        load_encoder("dinov2-vitb14", dino_file)


def test_vgg_without_one_layer_is_refused_by_name(vgg_file, tmp_path):
    weights = torch.load(vgg_file, weights_only=True)
    del weights["features.27.weight"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(FileFormatError, match=r"1 missing \(layers\.27\.weight\)"):
        load_encoder("vgg19-bn", tmp_path / "part.pth")


@pytest.mark.parametrize("name", ["vgg19-bn", "dinov2-vits14", "dinov2-vitb14", "dinov2-vitl14"])
def test_absent_weights_are_named_with_address_and_place(name, tmp_path):
    with pytest.raises(MissingError) as caught:
        load_encoder(name)
    assert "https://" in str(caught.value)
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in str(caught.value)


def test_dense_sift_takes_no_weights(tmp_path):
    with pytest.raises(L2MError, match="no weights"):
        load_encoder("dense-sift", tmp_path / "sift.pth")
