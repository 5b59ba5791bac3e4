"""Which matchers are offered, what they say they need, and that they load through the real code from local files.

The published networks are built at small widths, the rest of the way (files, wrappers, names, strictness) is theirs.
"""

import warnings

import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.encoders.dinov2 import DinoCfg
from l2m_viz.encoders.vgg import VGG19Cfg
from l2m_viz.errors import FileFormatError, L2MError, MissingError, ShapeError
from l2m_viz.matching import list_matchers, load_matcher, sparse, weights
from l2m_viz.matching.gp import GPCfg, GPCoarseCfg
from l2m_viz.matching.network import DenseNetwork, NetworkCfg, VGGDinoCfg
from l2m_viz.matching.refiner import RefinerCfg
from l2m_viz.matching.transformer_decoder import TransformerCfg
from l2m_viz.matching.weights import CHECKPOINTS, official_key

SMALL = NetworkCfg(
    encoder=VGGDinoCfg(
        VGG19Cfg(widths=(4, 6, 8, 10), depths=(1, 1, 1, 1)),
        DinoCfg(dim=12, depth=1, num_heads=2, train_side=56),
    ),
    coarse=GPCoarseCfg(
        gp=GPCfg(dim=12), decoder=TransformerCfg(blocks=1, heads=2), anchor_hw=(8, 8), wrap=True
    ),
    refiners=(
        RefinerCfg(stride=14, displacement_dim=4, radius=1, blocks=1, reach=16),
        RefinerCfg(stride=1, displacement_dim=2, blocks=1),
    ),
    projections=((14, 12), (1, 3)),
)
PUBLISHED = ["l2m++", "l2m++-v2", "roma-outdoor", "roma-indoor"]
VIT = "encoder.vit."


@pytest.fixture(autouse=True)
def small_networks(monkeypatch, tmp_path):
    """Small widths, empty caches, no developer's own weights."""
    monkeypatch.setattr(weights, "official_cfg", lambda: SMALL)
    monkeypatch.setenv("L2M_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def photo():
    return resize_image(load_sample("coffee").image_A, (60, 90))


def states(seed):
    """The files of a published matcher: everything but DINOv2 under the official names, and DINOv2."""
    torch.manual_seed(seed)
    state = DenseNetwork(SMALL).state_dict()
    matcher = {official_key(key): tensor for key, tensor in state.items() if not key.startswith(VIT)}
    return matcher, {key.removeprefix(VIT): tensor for key, tensor in state.items() if key.startswith(VIT)}


@pytest.fixture
def files(tmp_path):
    matcher, backbone = states(0)
    torch.save(matcher, tmp_path / "matcher.pth")
    torch.save(backbone, tmp_path / "backbone.pth")
    return {"weights": tmp_path / "matcher.pth", "backbone_weights": tmp_path / "backbone.pth"}


def put(checkpoint, state, tmp_path):
    path = tmp_path / "models" / checkpoint.name / checkpoint.file
    path.parent.mkdir(parents=True)
    torch.save(state, path)


def test_what_runs_is_told_from_what_needs_files():
    infos = {info.name: info for info in list_matchers()}
    assert [name for name, info in infos.items() if info.available] == ["l2m-tiny", "dis", "sift"]
    for name in ("l2m-tiny", "dis", "sift"):
        assert load_matcher(name).name == name
        assert infos[name].needs == ""
    for name, info in infos.items():
        if not info.available:
            with pytest.raises(MissingError) as caught:
                load_matcher(name)
            file = str(caught.value).split(" is not on this machine", maxsplit=1)[0]
            assert f"{file} (from https://" in info.needs  # the list and the error speak of the same file


def test_files_in_place_make_a_matcher_available(tmp_path):
    checkpoint = CHECKPOINTS["l2m++-v2"]
    matcher, backbone = states(0)
    put(checkpoint.decoder, matcher, tmp_path)
    assert not next(info for info in list_matchers() if info.name == "l2m++-v2").available
    put(checkpoint.backbone, backbone, tmp_path)
    info = next(info for info in list_matchers() if info.name == "l2m++-v2")
    assert info.available
    assert info.needs == ""
    assert load_matcher("l2m++-v2").name == "l2m++-v2"


def test_version_two_is_version_two(tmp_path):
    """The official code loads the first version when asked for the second, which is a Lightning checkpoint."""
    (first, backbone), (second, _) = states(1), states(2)
    put(CHECKPOINTS["l2m++"].decoder, first, tmp_path)
    lightning = {"state_dict": {f"model.{key}": tensor for key, tensor in second.items()}, "epoch": 7}
    put(CHECKPOINTS["l2m++-v2"].decoder, lightning, tmp_path)
    put(CHECKPOINTS["l2m++"].backbone, backbone, tmp_path)
    for name, state in (("l2m++", first), ("l2m++-v2", second)):
        loaded = load_matcher(name).network.refiners["14"].head.weight
        torch.testing.assert_close(loaded.detach(), state["decoder.conv_refiner.16.out_conv.weight"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_matchers_match_from_local_files(name, files, photo):
    matcher = load_matcher(name, device="cpu", resolution=(56, 84), upsample_resolution=(64, 96), **files)
    match = matcher.match(photo, photo[:, 10:])
    assert match.matcher == name
    assert match.warp_A_to_B.shape == (64, 96, 2)
    assert (match.hw_A, match.hw_B) == ((60, 90), (60, 80))


def test_preprocessing_and_sizes_are_the_checkpoints(files):
    settings = {name: load_matcher(name, **files).cfg for name in PUBLISHED}
    assert [cfg.imagenet_normalised for cfg in settings.values()] == [False, False, True, True]
    assert {(cfg.resolution, cfg.upsample_resolution) for cfg in settings.values()} == {
        ((560, 560), (864, 864))
    }


def test_normalisation_is_what_tells_two_matchers_of_the_same_weights_apart(files, photo):
    sizes = {"resolution": (56, 84), "upsample_resolution": (64, 96)}
    plain, normalised = (load_matcher(name, **files, **sizes) for name in ("l2m++", "roma-outdoor"))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((resize_image(photo, (56, 84)) - mean) / deviation).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = plain.network.encode(images)[14]
        features = normalised.network.encode(normalised._prepare(resize_image(photo, (56, 84)), (56, 84)))[14]
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_files_of_another_network_are_refused_by_name(files):
    swapped = {"weights": files["backbone_weights"], "backbone_weights": files["weights"]}
    with pytest.raises(FileFormatError, match=r"DINOv2 of roma-outdoor.*missing \(cls_token"):
        load_matcher("roma-outdoor", **swapped)


def test_options_that_mean_nothing_are_refused(files, unchecked):
    with pytest.raises(L2MError, match=r"'dis'.*none of these options, got weights"):
        load_matcher("dis", weights=files["weights"])
    with pytest.raises(L2MError, match=r"'loftr'.*only weights, got resolution"):
        load_matcher("loftr", weights=files["weights"], resolution=(56, 84))
    with pytest.raises(ShapeError, match="multiples of 14"):
        load_matcher("l2m++", resolution=(60, 90), **files)
    with pytest.raises(MissingError, match="roma-outdoor"):
        load_matcher("romeo")
    with pytest.raises(MissingError, match="no device"):
        load_matcher("dis", device="quantum")


def test_kornias_matchers_load_by_name(tmp_path):
    feature = pytest.importorskip("kornia.feature")
    torch.manual_seed(0)
    networks = {"loftr.ckpt": feature.LoFTR(pretrained=None), "aliked.pth": feature.ALIKED()}
    networks |= {"disk.pth": feature.DISK(), "glue.pth": feature.LightGlue(features=None, input_dim=128)}
    for file, network in networks.items():
        torch.save(network.state_dict(), tmp_path / file)
    loaded = [
        load_matcher("loftr", weights=tmp_path / "loftr.ckpt"),
        load_matcher("disk-lightglue", weights=tmp_path / "glue.pth", backbone_weights=tmp_path / "disk.pth"),
        load_matcher(
            "aliked-lightglue", weights=tmp_path / "glue.pth", backbone_weights=tmp_path / "aliked.pth"
        ),
    ]
    assert all(isinstance(matcher, sparse.SparseMatcher) for matcher in loaded)
    assert [matcher.name for matcher in loaded] == ["loftr", "disk-lightglue", "aliked-lightglue"]


def test_the_command_prints_a_line_for_each_and_what_is_missing(capsys):
    from l2m_viz.commands import matchers

    matchers()
    lines = capsys.readouterr().out.splitlines()
    started = [line.split() for line in lines if not line.startswith(" ")]
    assert [words[:3] for words in started] == [
        [info.name, info.kind, "ready" if info.available else "absent"] for info in list_matchers()
    ]
    assert sum("https://" in line for line in lines) == sum(not info.available for info in list_matchers())


@pytest.mark.parametrize(("amx", "avx512"), [(True, True), (False, True), (False, False)])
def test_bfloat16_where_the_processor_has_none_is_warned_of(monkeypatch, amx, avx512):
    """Asked for it is taken; unasked l2m-tiny takes what is faster."""
    has_it = amx or avx512
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matcher = load_matcher("l2m-tiny", "cpu", precision="bfloat16")
        unasked = load_matcher("l2m-tiny", "cpu")
    assert matcher.cfg.precision == "bfloat16"
    assert unasked.cfg.precision == ("bfloat16" if has_it else "float32")
    assert [("does not multiply bfloat16" in str(w.message)) for w in caught] == [True] * (not has_it)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, '"float32" or "bfloat16"'),
        ({"resolution": 320}, "two whole numbers"),
        ({"resolution": (320,)}, "two whole numbers"),
        ({"resolution": (320.0, 320.0)}, "two whole numbers"),
        ({"resolution": (True, 320)}, "two whole numbers"),
        ({"upsample_resolution": (0, 320)}, "two whole numbers"),
        ({"upsample_resolution": (10**6, 320)}, "two whole numbers"),
        ({"weights": ""}, "."),
        ({"turns": 90}, "True or False"),
    ],
)
def test_option_values_that_mean_nothing_are_refused(options, message, unchecked):
    with pytest.raises(L2MError, match=message):
        load_matcher("l2m-tiny", "cpu", **options)
