import json
from dataclasses import replace

import pytest
import torch

from l2m_viz.cli import main
from l2m_viz.encoders import load_encoder
from l2m_viz.encoders.conv_pyramid import TINY_PYRAMID, ConvPyramid, ConvPyramidCfg
from l2m_viz.encoders.dinov2 import DinoCfg, DinoViT
from l2m_viz.encoders.imagenet import normalize_imagenet
from l2m_viz.encoders.shipped import read_weights, save_weights
from l2m_viz.errors import L2MError
from l2m_viz.gaussians import FitCfg
from l2m_viz.training.feature_goals import GoalCfg
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.presets import (
    dinov2_stage_1,
    tiny_encoder,
    tiny_matcher,
    tiny_pretraining,
    tiny_stage_1,
)
from l2m_viz.training.run import RunCfg
from l2m_viz.training.scenes import SceneCfg
from l2m_viz.training.stage_1 import StageOneCfg, StageOneOptions, train_stage_1
from l2m_viz.training.train_encoder import (
    WEIGHTS,
    EncoderTrainingCfg,
    PretrainingCfg,
    as_encoder,
    make_network,
    pretrain_encoder,
    read_maps,
    train_encoder,
)

SMALL = ConvPyramidCfg(widths=(8, 12, 16, 24), blocks=(0, 0, 1, 1))
DINO = DinoCfg(dim=24, depth=2, num_heads=3, train_side=56)
RUN = RunCfg(steps=2, log_every=1, warmup_steps=1, precision="float32")
PRETRAINING = PretrainingCfg(
    encoder=SMALL,
    run=RUN,
    batch_size=2,
    workers=0,
    pairs=PairCfg(hw=(64, 80), depth="flat", holes="background"),
)
TRAINING = EncoderTrainingCfg(
    encoder=SMALL, run=RUN, scenes=SceneCfg(hw=(64, 80), views=3), batch_size=2, workers=0
)


@pytest.fixture(scope="module")
def flat():
    torch.manual_seed(0)
    return ConvPyramid(SMALL).eval()


def test_pretraining_learns_writes_and_resumes(photos, tmp_path):
    lines = []
    encoder = pretrain_encoder(photos, tmp_path, PRETRAINING, report=lines.append)
    assert isinstance(encoder, ConvPyramid)
    assert {"hit_8", "hit_16", "loss"} <= lines[0].keys()
    state, meta = read_weights(tmp_path / WEIGHTS)
    assert meta["steps"] == "2"
    assert state.keys() == encoder.state_dict().keys()  # the projections stay behind
    again = pretrain_encoder(photos, tmp_path, PRETRAINING)  # finished: nothing is trained
    for a, b in zip(encoder.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_pretraining_brings_corresponding_points_together(photos, tmp_path):
    """Two photos over and over: the share of points that find their partner rises from chance to most."""
    cfg = replace(PRETRAINING, batch_size=4, run=replace(RUN, steps=60, lr=3e-3), difficulty=(0.1, 0.4))
    lines = []
    pretrain_encoder(photos, tmp_path, cfg, report=lines.append)
    hits = torch.tensor([line["hit_8"] for line in lines])
    assert hits[-10:].mean() > 2 * hits[:10].mean()


def test_the_student_comes_nearer_to_the_goals_and_the_teacher_stays(photos, tmp_path, flat):
    before = {key: value.clone() for key, value in flat.state_dict().items()}
    cfg = replace(TRAINING, run=replace(RUN, steps=30, lr=1e-3), contrast_weight=0.0)
    lines = []
    student = train_encoder(photos, tmp_path, flat.state_dict(), cfg, report=lines.append)
    assert lines[0]["seen"] > 0.1
    agree = torch.tensor([line["agree"] for line in lines])
    assert agree[-8:].mean() < 0.9 * agree[:8].mean()
    for key, value in flat.state_dict().items():
        assert torch.equal(value, before[key])
        if "running_" in key:  # the norms keep the teacher's statistics
            assert torch.equal(student.state_dict()[key], value)


def test_3d_training_in_two_sessions_is_that_in_one(photos, tmp_path, flat):
    cfg = replace(TRAINING, run=replace(RUN, steps=4))
    whole = train_encoder(photos, tmp_path / "whole", flat.state_dict(), cfg)

    class Stop(Exception):
        pass

    def after_two(numbers):
        if numbers["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train_encoder(photos, tmp_path / "parts", flat.state_dict(), cfg, report=after_two)
    parts = train_encoder(photos, tmp_path / "parts", flat.state_dict(), cfg)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_run_does_not_go_on_with_another_teacher(photos, tmp_path, flat):
    train_encoder(photos, tmp_path, flat.state_dict(), TRAINING)
    with pytest.raises(L2MError, match="teacher"):
        train_encoder(photos, tmp_path, ConvPyramid(SMALL).state_dict(), TRAINING)


def test_views_must_be_whole_cells(photos, tmp_path, flat):
    cfg = replace(TRAINING, scenes=SceneCfg(hw=(64, 88), views=3))
    with pytest.raises(L2MError, match="16 divides"):
        train_encoder(photos, tmp_path, flat.state_dict(), cfg)


def test_optimised_goals_train_too(photos, tmp_path, flat):
    goals = GoalCfg(method="optimise", fit=FitCfg(num_steps=2, width=8))
    cfg = replace(TRAINING, goals=goals, run=replace(RUN, steps=1))
    lines = []
    train_encoder(photos, tmp_path, flat.state_dict(), cfg, report=lines.append)
    assert 0 < lines[0]["agree"] < 10


def test_dinov2_is_trained_the_same_way(photos, tmp_path):
    torch.manual_seed(0)
    teacher = DinoViT(DINO)
    cfg = replace(TRAINING, encoder=DINO, scenes=SceneCfg(hw=(70, 84), views=3))
    lines = []
    student = train_encoder(
        photos, tmp_path, teacher.state_dict(), cfg, val_photos=photos, report=lines.append
    )
    assert isinstance(student, DinoViT)
    assert any("val/pck8" in line for line in lines)
    moved = [
        name
        for (name, a), b in zip(teacher.named_parameters(), student.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert "mask_token" not in moved
    assert "blocks.0.attn.qkv.weight" in moved
    state, _ = read_weights(tmp_path / WEIGHTS)
    DinoViT(DINO).load_state_dict(state)


def test_what_a_network_says_is_read_as_its_kind_wants_it():
    images = torch.rand(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    vit = make_network(DINO).eval()
    with torch.no_grad():
        maps = read_maps(vit, images, DINO)
        torch.testing.assert_close(maps[14], vit(normalize_imagenet(images)))
    pyramid = make_network(SMALL).eval()
    with torch.no_grad():
        maps = read_maps(pyramid, images[..., :48, :80], SMALL)
        assert {s: tuple(m.shape) for s, m in maps.items()} == {8: (1, 16, 6, 10), 16: (1, 24, 3, 5)}
        encoder = as_encoder("x", pyramid, SMALL, torch.device("cpu"))
        features = encoder(images[0, :, :48, :80].permute(1, 2, 0))
    torch.testing.assert_close(features, maps[8][0].permute(1, 2, 0))


def test_stage_1_makes_both_files_and_goes_on(photos, tmp_path):
    cfg = StageOneCfg("small", TRAINING, PRETRAINING)
    said = []
    flat, aware = train_stage_1(photos, tmp_path, cfg, val_photos=photos, say=said.append)
    assert (flat.name, aware.name) == ("small-2d.safetensors", "small.safetensors")
    before = aware.read_bytes()
    train_stage_1(photos, tmp_path, cfg, val_photos=photos, say=said.append)
    assert read_weights(aware)[0].keys() == ConvPyramid(SMALL).state_dict().keys()
    assert len(before) == aware.stat().st_size
    # what taught is what was written: 3D alone, from the file
    (alone,) = train_stage_1(photos, tmp_path, replace(cfg, stage="3d"), say=said.append)
    assert alone == aware


def test_3d_waits_for_a_2d_encoder_that_is_finished(photos, tmp_path):
    cfg = StageOneCfg("small", TRAINING, PRETRAINING)
    with pytest.raises(L2MError, match="Train the 2D encoder first"):
        train_stage_1(photos, tmp_path, replace(cfg, stage="3d"))
    said = []
    written = train_stage_1(photos, tmp_path, replace(cfg, minutes=1e-9), say=said.append)
    assert [path.name for path in written] == ["small-2d.safetensors"]
    assert "0 of 2 steps" in said[-1]


def test_a_published_network_needs_its_weights(photos, tmp_path):
    with pytest.raises(L2MError, match="published weights"):
        train_stage_1(photos, tmp_path, StageOneCfg("dino", replace(TRAINING, encoder=DINO)))


def test_options_change_what_they_name_and_nothing_else():
    cfg = tiny_stage_1()
    same = StageOneOptions().applied_to(cfg)
    assert same == cfg
    options = StageOneOptions(
        steps=7, pretrain_steps=8, contrast=0.5, features="optimise", stage="2d", workers=3
    )
    other = options.applied_to(cfg)
    assert other.training.run == replace(cfg.training.run, steps=7)
    assert other.pretraining.run == replace(cfg.pretraining.run, steps=8)
    assert (other.training.contrast_weight, other.training.goals.method, other.stage) == (
        0.5,
        "optimise",
        "2d",
    )
    assert other.training.workers == other.pretraining.workers == 3


def test_presets_fit_the_matcher_and_the_published_network():
    assert tiny_pretraining().encoder == tiny_encoder().encoder == tiny_matcher().network.encoder
    assert load_encoder("dense-sift").name != dinov2_stage_1().name
    hw = dinov2_stage_1().training.scenes.hw
    assert all(side % 14 == 0 for side in hw)
    assert dinov2_stage_1().pretraining is None


def test_the_command_trains_the_preset_from_a_2d_encoder(photos, tmp_path, monkeypatch, capsys):
    begin = tmp_path / "begin.safetensors"
    save_weights(begin, ConvPyramid(TINY_PYRAMID).state_dict(), {}, eight_bit=True)
    out = tmp_path / "run"
    monkeypatch.setattr(
        "sys.argv",
        ["l2m", "train", "encoder", str(photos), "--out", str(out), "--begin-from", str(begin), "--steps", "1",
         "--workers", "0", "--device", "cpu"],
    )  # fmt: skip
    main()
    assert f"weights: {out / 'l2m-tiny.safetensors'}" in capsys.readouterr().out
    assert load_encoder("l2m-tiny", out / "l2m-tiny.safetensors", device="cpu").dim == 96
    assert not (out / "l2m-tiny-2d.safetensors").exists()


_TRAINING = """
import sys
from pathlib import Path

import torch
from tests.training.test_train_encoder import PRETRAINING, TRAINING
from l2m_viz.training.run import start_accelerator
from l2m_viz.training.stage_1 import StageOneCfg, train_stage_1

torch.set_num_threads(1)
photos, out = Path(sys.argv[1]), Path(sys.argv[2])
train_stage_1(photos, out, StageOneCfg("small", TRAINING, PRETRAINING), val_photos=photos)
state = torch.load(out / "3d" / "checkpoint.pt", weights_only=True)
torch.save(state["step"], out / f"step_{start_accelerator('cpu').process_index}.pt")
"""


def test_two_processes_make_one_stage_1(photos, tmp_path, in_two_processes):
    out = tmp_path / "run"
    printed = in_two_processes(_TRAINING, photos, out)
    assert printed.count("2D encoder: ") == printed.count("3D-aware encoder: ") == 1
    for process in range(2):
        assert torch.load(out / f"step_{process}.pt", weights_only=True) == 2
    state, meta = read_weights(out / "small.safetensors")
    assert meta["steps"] == "2"
    assert all(torch.isfinite(value).all() for value in state.values())
    lines = [json.loads(line) for line in (out / "3d" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]  # two steps and one verdict, written once
