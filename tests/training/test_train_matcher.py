import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from l2m_viz.encoders.conv_pyramid import ConvPyramidCfg
from l2m_viz.errors import ImageError, L2MError
from l2m_viz.matching.attention import AttentionCoarseCfg
from l2m_viz.matching.network import DenseNetwork, NetworkCfg
from l2m_viz.matching.refiner import RefinerCfg
from l2m_viz.matching.tiny import read_weights
from l2m_viz.training.occluders import OccluderCfg
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.presets import PRESETS
from l2m_viz.training.rims import RimCfg
from l2m_viz.training.run import RunCfg
from l2m_viz.training.stream import PairStream
from l2m_viz.training.train_matcher import (
    WEIGHTS,
    Curriculum,
    Dressing,
    MatcherTrainingCfg,
    MatcherTrainingOptions,
    train_matcher,
    with_unrelated,
)
from tests.matching.test_network import small_official_cfg

NETWORK = NetworkCfg(
    encoder=ConvPyramidCfg(widths=(8, 12, 16, 24), blocks=(0, 0, 1, 1)),
    coarse=AttentionCoarseCfg(dim=32, layers=1, heads=2),
    refiners=(RefinerCfg(stride=8, displacement_dim=4, radius=1, hidden=16, blocks=1),),
    projections=((8, 8),),
)
CFG = MatcherTrainingCfg(
    network=NETWORK,
    run=RunCfg(steps=4, log_every=1, warmup_steps=1, precision="float32"),
    pairs=PairCfg(holes="background"),
    batch_size=2,
    sizes=((48, 64), (64, 48)),
    evaluate_every=2,
    workers=0,
)


def test_a_run_in_two_sessions_is_the_run_in_one(photos, tmp_path):
    whole = train_matcher(photos, tmp_path / "whole", CFG)
    stopped = replace(CFG, run=replace(CFG.run, minutes=1e-9))
    train_matcher(photos, tmp_path / "parts", stopped)  # not one step

    class Stop(Exception):
        pass

    def after_two(numbers):
        if numbers["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train_matcher(photos, tmp_path / "parts", CFG, report=after_two)
    parts = train_matcher(photos, tmp_path / "parts", CFG)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    written, meta = read_weights(tmp_path / "parts" / WEIGHTS)
    assert meta["steps"] == "4"
    assert written.keys() == whole.state_dict().keys()


def test_validation_judges_other_photos_and_is_logged(photos, tmp_path):
    lines = []
    train_matcher(
        photos, tmp_path, replace(CFG, run=replace(CFG.run, steps=2)), val_photos=photos, report=lines.append
    )
    figures = [line for line in lines if "val/epe_px" in line]
    assert [line["step"] for line in figures] == [2]
    assert 0 <= figures[0]["val/pck3"] <= 1


def test_the_curriculum_opens():
    curriculum = Curriculum(low=0.1, high_first=0.5, high_last=1.5, ramp_steps=100)
    assert curriculum.range_at(0) == (0.1, 0.5)
    assert curriculum.range_at(50) == (0.1, pytest.approx(1.0))
    assert curriculum.range_at(1000) == (0.1, 1.5)


def test_what_a_user_may_choose():
    cfg = PRESETS["tiny"]()
    assert MatcherTrainingOptions().applied_to(cfg) == cfg
    chosen = MatcherTrainingOptions(lr=1e-4, ramp_steps=0, steps=70).applied_to(cfg)
    assert (chosen.run.lr, chosen.run.steps) == (1e-4, 70)
    lent = MatcherTrainingOptions(batch_size=32, refined=1.0, budget_minutes=8).applied_to(cfg)
    assert (lent.batch_size, lent.refined, lent.run.budget_minutes, lent.run.lr) == (32, 1.0, 8, cfg.run.lr)
    for wrong in ({"batch_size": 0}, {"refined": 0.0}, {"budget_minutes": 0.0}):
        with pytest.raises(L2MError, match=f"{next(iter(wrong))}: expected"):
            MatcherTrainingOptions(**wrong).applied_to(cfg)
    assert chosen.curriculum.range_at(0) == cfg.curriculum.range_at(
        cfg.curriculum.ramp_steps
    )  # as hard as it gets


def test_unrelated_pairs_get_another_picture_and_are_covisible_nowhere(photos):
    batch = next(iter(PairStream(photos, replace(CFG.pairs, hw=(48, 64)), batch_size=4, length=1)))
    marked = with_unrelated(batch, share=1.0)
    assert not marked.covisibility_A_to_B.any()
    assert not marked.covisibility_B_to_A.any()
    torch.testing.assert_close(marked.image_B, batch.image_B.roll(-1, dims=0))
    assert with_unrelated(batch, share=0.0) is batch


def test_pairs_are_dressed_alike_in_any_process(photos):
    """Occluders, rims, light and unrelated views depend on a pair's seed, not on who makes it."""
    cfg = PRESETS["tiny"]()
    dressing = Dressing(OccluderCfg(share=1.0), RimCfg(share=1.0), cfg.augment, 0.5)
    settings = {"batch_size": 3, "length": 2, "seed": 4}
    pairs = replace(cfg.pairs, hw=(48, 64))
    plain = list(PairStream(photos, pairs, **settings))
    for workers in (0, 1):
        dressed = list(PairStream(photos, pairs, **settings, num_workers=workers, finish=dressing))
        for before, after in zip(plain, dressed, strict=True):
            assert_equal(dressing(before), after)
            assert (before.image_A - after.image_A).abs().amax(dim=(1, 2, 3)).min() > 0.02
            assert (before.image_B - after.image_B).abs().amax(dim=(1, 2, 3)).min() > 0.02
            assert before.depth_A.ne(after.depth_A).any()


def test_a_batch_that_cannot_be_shared_is_refused_before_the_folder_is_begun(photos, tmp_path, monkeypatch):
    class Three:
        num_processes, device = 3, torch.device("cpu")

    monkeypatch.setattr("l2m_viz.training.train_matcher.start_accelerator", lambda device: Three())
    with pytest.raises(L2MError, match="a batch that 3 processes share evenly, got 2"):
        train_matcher(photos, tmp_path / "run", CFG)
    assert not (tmp_path / "run").exists()


def assert_equal(one, other):
    for name, values in vars(one).items():
        if isinstance(values, torch.Tensor):
            torch.testing.assert_close(values, getattr(other, name), rtol=0, atol=0, msg=name)
        else:
            assert values == getattr(other, name)


@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_does(photos, tmp_path):
    """Two float32 runs of four steps: batches, losses and steps are the same but for the order of sums."""
    trained = {
        device: train_matcher(photos, tmp_path / device, CFG, device=device).cpu().state_dict()
        for device in ("cpu", "cuda")
    }
    for name, values in trained["cpu"].items():
        torch.testing.assert_close(values, trained["cuda"][name], rtol=1e-2, atol=2e-3, msg=name)


def test_no_photos_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="no such folder"):
        train_matcher(tmp_path / "nowhere", tmp_path / "run", CFG)


def test_frozen_the_encoder_stays(photos, tmp_path):
    torch.manual_seed(CFG.run.seed)
    before = train_matcher(photos, tmp_path / "a", replace(CFG, run=replace(CFG.run, minutes=1e-9)))
    start = {k: v.clone() for k, v in before.encoder.state_dict().items()}  # statistics of norms, too
    trained = train_matcher(
        photos, tmp_path / "b", replace(CFG, frozen=("encoder",)), begin_from=before.state_dict()
    )
    for name, value in trained.encoder.state_dict().items():
        torch.testing.assert_close(value, start[name], msg=name)
    assert not torch.equal(trained.coarse.entry.weight, before.coarse.entry.weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_describes_a_network_and_its_parts(preset):
    cfg = PRESETS[preset]()
    with torch.device("meta"):
        network = DenseNetwork(cfg.network)
    for part in cfg.frozen:
        assert any(True for _ in network.get_submodule(part).parameters())
    coarse = cfg.network.coarse.stride
    strides = [coarse, *(refiner.stride for refiner in cfg.network.refiners)]
    for height, width in cfg.sizes:
        assert all(side % stride == 0 for side in (height, width) for stride in strides)


def test_small_networks_of_the_official_kind_train_too(photos, tmp_path):
    """VGG and a frozen DINOv2, Gaussian process, anchors on another grid than the cells, stride 14."""
    network = small_official_cfg()
    cfg = replace(
        CFG,
        network=network,
        sizes=((56, 112),),
        run=replace(CFG.run, steps=2),
        frozen=("encoder.vit",),
        imagenet_normalised=True,
        encoder_lr=0.05,
    )
    torch.manual_seed(cfg.run.seed)
    before = DenseNetwork(network).state_dict()
    lines = []
    trained = train_matcher(photos, tmp_path, cfg, report=lines.append).state_dict()
    assert all(line["skipped"] == 0 for line in lines)
    moved = {name for name, value in trained.items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("encoder.vit.") for name in moved)
    assert {name.partition(".")[0] for name in moved} == {"encoder", "projections", "coarse", "refiners"}


@pytest.mark.slow
def test_killed_and_started_again_the_command_goes_on(photos, tmp_path):
    options = ["--out", str(tmp_path), "--workers", "0", "--steps", "3"]
    arguments = ["l2m", "train", "matcher", str(photos), *options]
    code = f"import sys; sys.argv = {arguments!r}; from l2m_viz.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(600):
        if (tmp_path / "run.json").is_file():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert json.loads((tmp_path / "run.json").read_text())["run"]["steps"] == 3
    assert read_weights(tmp_path / WEIGHTS)[1]["steps"] == "3"
