"""Files of our own weights: 8 bits judged by the bound of rounding, encoders by the network they were made from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2m_viz.data import load_sample
from l2m_viz.encoders import encoder as encoders, load_encoder
from l2m_viz.encoders.conv_pyramid import TINY_PYRAMID, ConvPyramid, load_encoder_state
from l2m_viz.encoders.shipped import Shipped, quantise, read_weights, save_weights
from l2m_viz.errors import FileFormatError, MissingError
from l2m_viz.matching.tiny import tiny_cfg


@pytest.fixture(scope="module")
def pyramid():
    torch.manual_seed(0)
    network = ConvPyramid(TINY_PYRAMID)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def file(pyramid, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_weights(path, pyramid.state_dict(), {"steps": "7"}, eight_bit=True)
    return path


def test_eight_bits_are_off_by_half_a_scale_at_most():
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-7, 1e-5, 1e-3, 0.02, 1.0, 300.0])  # below half precision's normal numbers, too
    weight = torch.randn(6, 5, 3, 3, generator=draw) * sizes[:, None, None, None]
    steps, scale = quantise(weight)
    assert steps.dtype == torch.int8
    assert scale.dtype == torch.float16
    back = steps.double() * scale.double()[:, None, None, None]
    error = (back - weight.double()).abs().amax(dim=(1, 2, 3))
    assert (error <= scale.double() / 2 * (1 + 1e-6)).all()
    # no scale is larger than it has to be by more than one step of half precision
    wanted = weight.abs().amax(dim=(1, 2, 3)).double() / 127
    assert (scale.double() - wanted <= torch.maximum(wanted * 2**-10, torch.tensor(2.0**-24))).all()
    assert steps[2:].abs().amax(dim=(1, 2, 3)).tolist() == [127] * 4


def test_a_channel_of_zeros_stays_zero():
    steps, scale = quantise(torch.zeros(2, 3, 3, 3))
    assert not steps.any()
    assert not scale.any()


def test_integers_and_scales_survive_reading_and_writing(file, tmp_path):
    state, meta = read_weights(file)
    save_weights(tmp_path / "again.safetensors", state, meta, eight_bit=True)
    once, twice = load_file(file), load_file(tmp_path / "again.safetensors")
    assert once.keys() == twice.keys()
    for key, value in once.items():
        assert torch.equal(value, twice[key]), key
    assert meta == {"steps": "7"}
    eight_bit = {key for key, value in once.items() if value.dtype == torch.int8}
    assert eight_bit == {key for key, value in state.items() if value.shape[2:] == (3, 3)}


def test_two_encoders_and_the_matcher_are_below_20_mb(file):
    shipped = Shipped.named("l2m-tiny.safetensors").path.stat().st_size
    assert file.stat().st_size < 2.75e6
    assert 2 * file.stat().st_size + shipped <= 20e6


def test_without_8_bits_weights_are_in_half_precision(pyramid, tmp_path):
    path = tmp_path / "half.safetensors"
    save_weights(path, pyramid.state_dict(), {})
    state, _ = read_weights(path)
    for key, value in pyramid.state_dict().items():
        exact = "running_" in key or not value.is_floating_point()
        torch.testing.assert_close(
            state[key], value, rtol=0 if exact else 2**-10, atol=0 if exact else 2**-24
        )


def test_absent_files_say_whose_they_are(tmp_path):
    with pytest.raises(FileFormatError, match="Check the path"):
        read_weights(tmp_path / "mine.safetensors")
    with pytest.raises(FileFormatError, match="ships with the package"):
        read_weights(Shipped.named("gone.safetensors").path)


def test_integers_without_scales_are_refused(file, tmp_path):
    stored = load_file(file)
    name = next(key for key in stored if key.endswith(":scale"))
    del stored[name]
    save_file(stored, tmp_path / "part.safetensors")
    with pytest.raises(FileFormatError, match="a scale for each"):
        read_weights(tmp_path / "part.safetensors")


@pytest.mark.parametrize("name", ["l2m-tiny", "l2m-tiny-2d"])
def test_the_tiny_encoders_say_the_pyramids_merged_map(name, pyramid, file):
    photo = load_sample("coffee").image_A[100:164, 200:296].contiguous()  # 64x96, multiples of 16
    encoder = load_encoder(name, file, device="cpu")
    assert (encoder.name, encoder.stride, encoder.dim) == (name, 8, 96)
    with torch.no_grad():
        expected = pyramid(photo.permute(2, 0, 1)[None])[8][0].permute(1, 2, 0)  # normalises the image itself
    features = encoder(photo)
    assert features.shape == (8, 12, 96)
    close = torch.nn.functional.cosine_similarity(features, expected, dim=-1)
    assert close.min() > 0.995  # 8 bits
    # sides that are odd multiples of 8: the border is repeated, cells stay where they are
    part = encoder(photo[:56, :88])
    assert part.shape == (7, 11, 96)
    far = torch.nn.functional.cosine_similarity(part[:3, :5], features[:3, :5], dim=-1)
    assert far.min() > 0.9


def test_an_encoder_that_is_not_shipped_says_what_to_do(monkeypatch, tmp_path):
    absent = Shipped(tmp_path / "l2m-tiny-encoder.safetensors")
    monkeypatch.setitem(encoders._ENCODERS, "l2m-tiny", lambda w, d: encoders._tiny("l2m-tiny", absent, w, d))
    with pytest.raises(MissingError, match=r"l2m-tiny-encoder\.safetensors.*train encoder"):
        load_encoder("l2m-tiny")


def test_stage_2_may_start_from_the_file(pyramid, file):
    assert tiny_cfg().encoder == TINY_PYRAMID
    state = load_encoder_state(file)
    ConvPyramid(tiny_cfg().encoder).load_state_dict(state)
    largest = max(
        ((state[key] - value).abs().max() / value.abs().max()).item()
        for key, value in pyramid.state_dict().items()
        if value.ndim == 4
    )
    assert 0 < largest < 1 / 127  # half a step of the largest channel, and then some


def test_weights_of_another_network_are_refused(tmp_path):
    save_weights(tmp_path / "other.safetensors", {"levels.0.weight": torch.zeros(2, 3)}, {})
    with pytest.raises(FileFormatError, match="do not fit other"):
        load_encoder("l2m-tiny", tmp_path / "other.safetensors")
