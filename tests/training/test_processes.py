"""One run made by two processes."""

import json

import torch

_SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import torch

from l2m_viz.training.run import start_accelerator
from l2m_viz.training.train_matcher import train_matcher
from tests.training.test_train_matcher import CFG

photos, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
cfg = replace(CFG, run=replace(CFG.run, steps=steps, minutes=60), batch_size=4, refined=0.5)
lines = []
trained = train_matcher(photos, out, cfg, val_photos=photos, report=lines.append)
process = start_accelerator("cpu").process_index
torch.save(trained.state_dict(), out / f"weights_{process}.pt")
(out / f"lines_{process}.txt").write_text(str(len(lines)))
"""


def test_two_processes_make_one_run_and_resume_it(photos, tmp_path, in_two_processes):
    out = tmp_path / "run"
    in_two_processes(_SCRIPT, photos, out, 2)
    in_two_processes(_SCRIPT, photos, out, 4)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]  # written by one of them
    assert int((out / "lines_0.txt").read_text()) >= 3
    assert int((out / "lines_1.txt").read_text()) == 0
    first, second = (torch.load(out / f"weights_{k}.pt", weights_only=True) for k in (0, 1))
    for name, value in first.items():
        # each process's norms see its own share of the batch; the first one's count
        if "running_" not in name:
            torch.testing.assert_close(value, second[name], msg=name)
