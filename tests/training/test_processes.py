"""One run made by two processes on this CPU; torchrun starts them, as `accelerate launch` does on several GPUs."""

import json
import subprocess
import sys

import pytest
import torch

from l2m_viz.data import load_sample, write_image

_SCRIPT = """
import sys
from pathlib import Path

import torch

from l2m_viz.encoders.conv_pyramid import ConvPyramidCfg
from l2m_viz.matching.attention import AttentionCoarseCfg
from l2m_viz.matching.network import NetworkCfg
from l2m_viz.matching.refiner import RefinerCfg
from l2m_viz.training.run import RunCfg, start_accelerator
from l2m_viz.training.train_matcher import MatcherTrainingCfg, train_matcher

photos, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
network = NetworkCfg(
    encoder=ConvPyramidCfg(widths=(8, 12, 16, 24), blocks=(0, 0, 1, 1)),
    coarse=AttentionCoarseCfg(dim=32, layers=1, heads=2),
    refiners=(RefinerCfg(stride=8, displacement_dim=4, radius=1, hidden=16, blocks=1),),
    projections=((8, 8),),
)
run = RunCfg(steps=steps, log_every=1, warmup_steps=1, bf16=False, minutes=60)
cfg = MatcherTrainingCfg(
    network=network, run=run, batch_size=4, sizes=((48, 64), (64, 48)), workers=0, refined=0.5
)
lines = []
trained = train_matcher(photos, out, cfg, val_photos=photos, report=lines.append)
process = start_accelerator("cpu").process_index
torch.save(trained.state_dict(), out / f"weights_{process}.pt")
(out / f"lines_{process}.txt").write_text(str(len(lines)))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("motorcycle", "coffee"):
        write_image(folder / f"{name}.png", load_sample(name).image_A[:200, :260])
    return folder


def _launch(script, photos, out, steps):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(script), str(photos), str(out), str(steps)]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_make_one_run_and_resume_it(photos, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    out = tmp_path / "run"
    _launch(script, photos, out, 2)
    _launch(script, photos, out, 4)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]  # written by one of them
    assert int((out / "lines_0.txt").read_text()) >= 3
    assert int((out / "lines_1.txt").read_text()) == 0
    first, second = (torch.load(out / f"weights_{k}.pt", weights_only=True) for k in (0, 1))
    for name, value in first.items():
        if (
            "running_" not in name
        ):  # each process's norms see its own share of the batch; the first one's count
            torch.testing.assert_close(value, second[name], msg=name)
