"""Checkpoints: where they are found, how they are read, and that every fault of one is named."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from l2m_viz.encoders.vgg import VGG19Pyramid
from l2m_viz.encoders.weights import Checkpoint, resolve_device
from l2m_viz.errors import FileFormatError, MissingError
from l2m_viz.matching.network import DenseNetwork, official_cfg
from l2m_viz.matching.weights import (
    CHECKPOINTS,
    load_official,
    load_strict,
    official_key,
    published_encoder,
    read_state,
    save_official,
)

STATE_DICT = Path(__file__).parents[3] / "shared" / "reference" / "l2mpp_state_dict.json"
HUB = Checkpoint("net", "a+b.pth", "https://huggingface.co/datasets/owner/name/resolve/main/a%2Bb.pth")
RELEASE = Checkpoint("net", "net.pth", "https://example.org/releases/v1/net.pth", aliases=("net_v1-pth",))


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """Empty caches; returns where torch's is."""
    monkeypatch.delenv("L2M_MODELS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        "first.weight": torch.randn(4, 3),
        "first.bias": torch.randn(4),
        "second.weight": torch.randn(2, 4),
    }


def network():
    return nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 2, bias=False)})


def put(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- where files are --------------------------------------------------------------------------------------


def test_an_absent_file_is_named_with_its_address_and_place(places, monkeypatch, tmp_path):
    with pytest.raises(MissingError) as caught:
        RELEASE.read()
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert f"Fetch {RELEASE.url} with a connection and put it at {places / 'net.pth'}" in str(caught.value)
    monkeypatch.setenv("L2M_MODELS", str(tmp_path / "own"))
    with pytest.raises(MissingError, match=str(tmp_path / "own" / "net" / "net.pth")):
        RELEASE.read()


def test_places_come_in_order(places, monkeypatch, tmp_path):
    assert HUB.find() is None
    cached = put(places / "a%2Bb.pth")  # as torch.hub names what it downloads from that address
    assert HUB.find() == cached
    snapshot = tmp_path / "hub" / "datasets--owner--name"
    put(snapshot / "refs" / "main", b"0123abcd")
    in_hub = put(snapshot / "snapshots" / "0123abcd" / "a+b.pth")
    assert HUB.find() == in_hub
    monkeypatch.setenv("L2M_MODELS", str(tmp_path / "own"))
    assert HUB.find() == in_hub  # the folder is set, but the file is not in it
    own = put(tmp_path / "own" / "net" / "a+b.pth")
    assert HUB.find() == own


def test_what_others_cached_under_their_name_is_found(places):
    cached = put(places / "net_v1-pth")
    assert RELEASE.find() == cached


def test_a_found_file_with_another_hash_is_refused(places):
    put(places / "net.pth")
    known = Checkpoint("net", "net.pth", RELEASE.url, sha256="ab" * 32)
    with pytest.raises(FileFormatError, match="expected sha256 abab"):
        known.read()


def test_a_file_of_ones_own_needs_no_hash(tmp_path, state):
    torch.save(state, tmp_path / "own.pth")
    known = Checkpoint("net", "net.pth", RELEASE.url, sha256="ab" * 32)
    assert known.read(tmp_path / "own.pth").keys() == state.keys()


def test_every_published_file_has_its_own_place():
    files = [part for each in CHECKPOINTS.values() for part in (each.decoder, each.backbone)]
    addresses = {(file.name, file.file): file.url for file in files}
    assert len(addresses) == len(set(addresses.values())) == 6
    assert CHECKPOINTS["l2m++-v2"].decoder.url.endswith(
        "v2.pth.ckpt"
    )  # the official code loads version one here


# --- how files are read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer_states": [{"lr": 0.1}]},
        lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
        lambda state: {"state_dict": {f"model.matcher.{key}": tensor for key, tensor in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": tensor for key, tensor in state.items()},
    ],
    ids=["bare", "lightning", "parallel", "two prefixes", "compiled"],
)
def test_wrappers_of_training_frameworks_are_taken_off(tmp_path, state, wrapped):
    torch.save(wrapped(state), tmp_path / "net.ckpt")
    loaded = load_strict(network(), read_state(tmp_path / "net.ckpt"), "net")
    torch.testing.assert_close(loaded["second"].weight.detach(), state["second.weight"])


def test_safetensors_are_read(tmp_path, state):
    from safetensors.torch import save_file

    save_file(state, tmp_path / "net.safetensors")
    torch.testing.assert_close(read_state(tmp_path / "net.safetensors"), state)
    (tmp_path / "net.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:-5])
    with pytest.raises(FileFormatError, match="truncated"):
        read_state(tmp_path / "net.safetensors")


class Bomb:
    """What a pickle can do to whoever opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "boom")


def test_code_in_a_file_is_not_run(tmp_path, state):
    torch.save({"state_dict": state, "hyper_parameters": Bomb(tmp_path / "ran")}, tmp_path / "net.ckpt")
    with pytest.raises(FileFormatError, match="never run"):
        read_state(tmp_path / "net.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or foreign"),
        (b"<!DOCTYPE html><html>", "never run|truncated"),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    path = put(tmp_path / "net.pth", content)
    with pytest.raises(FileFormatError, match=message):
        read_state(path)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_refused(tmp_path, state, share):
    torch.save(state, tmp_path / "net.pth")
    whole = (tmp_path / "net.pth").read_bytes()
    (tmp_path / "net.pth").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FileFormatError, match=r"net\.pth"):
        read_state(tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "a list"), ({"epoch": 3}, "a dictionary with epoch"), ({}, "nothing")],
)
def test_files_without_tensors_say_what_they_hold(tmp_path, content, message):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(FileFormatError, match=message):
        read_state(tmp_path / "net.pth")


def test_two_networks_in_one_file_are_not_mixed(tmp_path, state):
    torch.save(state | {f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "net.pth")
    with pytest.raises(FileFormatError, match=r"first\.weight twice"):
        read_state(tmp_path / "net.pth")


def test_no_such_file(tmp_path):
    with pytest.raises(MissingError, match=r"absent\.pth"):
        read_state(tmp_path / "absent.pth")


# --- how they enter a network -----------------------------------------------------------------------------


def test_every_fault_is_named(state):
    del state["first.bias"]
    state["third.weight"] = torch.zeros(1)
    state["second.weight"] = state["second.weight"].T
    with pytest.raises(FileFormatError) as caught:
        load_strict(network(), state, "net")
    for part in (
        "the weights do not fit net",
        "1 missing (first.bias)",
        "1 unexpected (third.weight)",
        "second.weight (4, 2) instead of (2, 4)",
    ):
        assert part in str(caught.value)


def test_many_faults_are_counted(state):
    state |= {f"extra.{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(FileFormatError, match=r"20 unexpected \(extra\.0, .* and 12 more\)"):
        load_strict(network(), state, "net")


def test_a_refused_file_leaves_the_network_as_it_was(state):
    net = network()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    del state["first.bias"]
    with pytest.raises(FileFormatError):
        load_strict(net, state, "net")
    torch.testing.assert_close(dict(net.state_dict()), before)


def test_half_precision_files_load_into_single_precision_networks(state):
    half = {key: tensor.half() for key, tensor in state.items()}
    with torch.device("meta"):
        net = network()
    for loaded in (load_strict(network(), half, "net"), load_strict(net, half, "net")):
        assert loaded["first"].weight.dtype == torch.float32
        torch.testing.assert_close(loaded["first"].weight.detach(), half["first.weight"].float())


def test_devices(unchecked):
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in {"cpu", "cuda"}
    with pytest.raises(MissingError, match="no device 'quantum'"):
        resolve_device("quantum")
    with pytest.raises(MissingError, match="no device 'meta'"):
        resolve_device("meta")


# --- the official checkpoints -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    """All names and shapes of the official files, with one number repeated, so that 1.6 GB are none."""
    if not STATE_DICT.is_file():
        pytest.skip(f"the official parameter list is not here: {STATE_DICT}")
    listed = json.loads(STATE_DICT.read_text())
    return tuple(
        {key: torch.zeros(()).expand(shape) for key, shape in listed[part].items()}
        for part in ("matcher", "dinov2_vitl14")
    )


def full_size():
    with torch.device("meta"):
        return DenseNetwork(official_cfg())


def test_the_full_size_network_takes_every_official_parameter(official):
    matcher, backbone = official
    net = full_size()
    keys = [official_key(key) for key in net.state_dict()]
    assert len(set(keys)) == len(keys) == len(matcher) + len(backbone)
    load_official(net, matcher, backbone, "l2m++")
    assert not any(tensor.is_meta for tensor in net.state_dict().values())


@pytest.mark.parametrize(
    "key",
    ["decoder.gps.16.pos_conv.bias", "encoder.cnn.layers.37.weight", "decoder.conv_refiner.4.out_conv.bias"],
)
def test_one_official_parameter_too_few_or_misshapen_is_named_as_the_file_names_it(official, key):
    matcher, backbone = official
    few = {name: tensor for name, tensor in matcher.items() if name != key}
    with pytest.raises(FileFormatError) as caught:
        load_official(full_size(), few, backbone, "l2m++")
    assert f"1 missing ({key})" in str(caught.value)
    with pytest.raises(FileFormatError) as caught:
        load_official(full_size(), few | {key: torch.zeros(3, 5)}, backbone, "l2m++")
    assert f"{key} (3, 5) instead of" in str(caught.value)


def test_a_training_of_ones_own_is_written_as_the_official_files_are(official, tmp_path):
    state, backbone = official
    with torch.device("meta"):
        network = DenseNetwork(official_cfg())
    trained = load_official(network, state, backbone, "test")
    path = tmp_path / "own.safetensors"
    save_official(path, trained.state_dict())
    written = read_state(path)
    path.unlink()  # 440 MB
    assert written.keys() == state.keys()
    assert all(written[key].shape == state[key].shape for key in state)


def test_a_training_begins_with_the_published_encoders(official, monkeypatch):
    _, backbone = official
    vgg = {key: torch.zeros_like(value) for key, value in VGG19Pyramid().state_dict().items()}
    monkeypatch.setattr(Checkpoint, "read", lambda self, *_: vgg if self.name == "vgg19-bn" else backbone)
    with torch.device("meta"):
        encoder = DenseNetwork(official_cfg()).encoder
    load_strict(encoder, published_encoder(), "encoder")


def test_a_wrong_backbone_is_named_too(official):
    matcher, backbone = official
    with pytest.raises(FileFormatError, match=r"DINOv2 of l2m\+\+.*1 missing \(blocks\.23\.ls2\.gamma\)"):
        load_official(
            full_size(), matcher, {k: v for k, v in backbone.items() if k != "blocks.23.ls2.gamma"}, "l2m++"
        )


def test_a_published_file_is_fetched_once_checked_and_loaded(monkeypatch, places, tmp_path, state):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "served").mkdir()
    torch.save(state, tmp_path / "served" / "net.pth")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        published = Checkpoint("net", "net.pth", f"http://127.0.0.1:{server.server_port}/net.pth")
        shares = []
        torch.testing.assert_close(published.read(progress=lambda share, what: shares.append(share)), state)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert shares == [1]
    torch.testing.assert_close(published.read(), state)  # the server is gone, the file is here
    with (places / "net.pth").open("ab") as file:
        file.write(b"more")
    with pytest.raises(FileFormatError, match="damaged or was replaced"):
        published.read()
