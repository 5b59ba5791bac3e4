import json
import math

import pytest
import torch
from torch import nn

from l2m_viz.errors import FileFormatError, L2MError
from l2m_viz.training.run import RunCfg, TrainingRun, run_loop

CFG = RunCfg(steps=12, lr=0.1, warmup_steps=2, log_every=3, ema_decay=0.5)


def _model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def _begin(folder, cfg=CFG, **settings):
    return TrainingRun(folder, _model(), cfg, {"lr": cfg.lr, **settings})


def _step(run, seen=None):
    def step(number):
        if seen is not None:
            seen.append(number)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        loss = (run.model(x) - x.sum(dim=1, keepdim=True) + 0.01 * torch.randn(8, 1)).square().mean()
        return loss, {"twice": 2 * number}

    return step


def _log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_cut_off_and_resumed_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = _begin(tmp_path / "whole")
    torch.manual_seed(0)
    run_loop(whole, _step(whole))

    first = _begin(tmp_path / "parts")
    torch.manual_seed(0)
    step = _step(first)

    def dies_at_8(number):
        if number == 8:
            raise KeyboardInterrupt
        if number == 6:
            first.save()
        return step(number)

    with pytest.raises(KeyboardInterrupt):
        run_loop(first, dies_at_8)
    second = _begin(tmp_path / "parts")
    assert second.step == 8
    seen = []
    run_loop(second, _step(second, seen))
    assert seen == [8, 9, 10, 11]
    for key, value in whole.ema.module.state_dict().items():
        torch.testing.assert_close(second.ema.module.state_dict()[key], value, msg=key)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[key], value, msg=key)


def test_after_kill_the_log_has_each_step_once(tmp_path):
    run = _begin(tmp_path)
    step = _step(run)
    for _ in range(6):
        loss, _ = step(run.step)
        run.update(loss)
        run.log({"loss": loss.item()})
        if run.step == 4:
            run.save()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a line
    resumed = _begin(tmp_path)
    assert resumed.step == 4
    assert [line["step"] for line in _log(tmp_path)] == [1, 2, 3, 4]


def test_the_average_is_an_exponential_one_that_forgets_its_beginning(tmp_path):
    run = _begin(tmp_path)
    weight = next(run.model.parameters())
    mean = weight.detach().clone()
    for number in range(5):
        loss, _ = _step(run)(number)
        run.update(loss)
        share = 1 if number == 0 else 1 - min(0.5, (1 + number) / (10 + number))  # 9/11, 9/12, 9/13, 9/14
        mean = (1 - share) * mean + share * weight.detach()
    torch.testing.assert_close(next(run.ema.module.parameters()), mean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(tmp_path, bad):
    run = _begin(tmp_path)
    before = [p.clone() for p in run.model.parameters()]
    numbers = run.update(next(run.model.parameters()).sum() * bad)
    assert numbers["skipped"] == 1
    assert run.step == 1
    for p, q in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q)


def test_learning_rate_rises_stays_and_falls():
    cfg = RunCfg(steps=100, lr=1.0, warmup_steps=10, cooldown=0.2)
    assert cfg.lr_at(0) == pytest.approx(0.1)
    assert [cfg.lr_at(s) for s in (9, 50, 80)] == pytest.approx([1, 1, 1])
    assert cfg.lr_at(90) == pytest.approx(0.01 + 0.99 / 2)
    assert cfg.lr_at(100) == pytest.approx(0.01)


def test_a_budget_of_minutes_brings_the_rate_down_before_it_ends_the_run(tmp_path, monkeypatch):
    """A clock that goes on by half a minute a step, in two sessions: in 10 minutes are 20 steps, 8 of them fall."""
    cfg = RunCfg(steps=1000, lr=1.0, warmup_steps=1, cooldown=0.4, budget_minutes=10.0, log_every=1)
    clock = {"now": 0.0}
    monkeypatch.setattr("l2m_viz.training.run.time.monotonic", lambda: clock["now"])
    rates = []
    for last in (6, 1000):
        run = TrainingRun(tmp_path, _model(), cfg, {})
        while not run.done and run.step < last:
            rates.append(run.update(_step(run)(run.step)[0])["lr"])
            clock["now"] += 30
        run.save()
        clock["now"] += 3600  # between the sessions nothing is spent
    with pytest.warns(UserWarning, match="trained for 10 of 10 minutes; give it a larger budget to go on"):
        assert TrainingRun(tmp_path, _model(), cfg, {}).done
    assert len(rates) == 20
    assert rates[:13] == pytest.approx([1.0] * 13)
    expected = [0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 8)]
    assert rates[13:] == pytest.approx(expected)


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path):
    _begin(tmp_path, batch={"size": 3, "workers": 1}).save()
    _begin(tmp_path, batch={"size": 3, "workers": 2})  # only how fast
    with pytest.raises(L2MError, match=r"batch\.size"):
        _begin(tmp_path, batch={"size": 4, "workers": 1})


def test_a_run_may_be_ended_sooner_than_planned(tmp_path):
    _begin(tmp_path, run={"steps": 60, "lr": 1.0}).save()
    _begin(tmp_path, run={"steps": 40, "lr": 1.0})
    assert json.loads((tmp_path / "run.json").read_text())["run"]["steps"] == 40


def test_parameters_learn_at_their_own_rates(tmp_path):
    run = TrainingRun(tmp_path, _model(), CFG, {}, lr_scales={"0.": 0.25})
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.update(sum(p.sum() for p in run.model.parameters()))
    moved = {name: (p - before[name]).abs().max().item() for name, p in run.model.named_parameters()}
    rate = CFG.lr_at(0)  # Adam's first step moves each parameter by its rate, and matrices decay beside it
    assert moved["0.bias"] == pytest.approx(0.25 * rate, rel=1e-3)
    assert moved["2.bias"] == pytest.approx(rate, rel=1e-3)
    assert moved["0.weight"] == pytest.approx(0.25 * rate, rel=0.02)


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    with pytest.raises(FileFormatError, match=r"1 missing \(0\.bias\)"):
        _begin(tmp_path).begin_from({k: v for k, v in _model().state_dict().items() if k != "0.bias"})


def test_a_damaged_checkpoint_is_named(tmp_path):
    _begin(tmp_path).save()
    data = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileFormatError, match=r"checkpoint\.pt"):
        _begin(tmp_path)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(FileFormatError, match="Weights only load failed"):
        _begin(tmp_path)


def test_minutes_stop_a_session(tmp_path):
    cfg = RunCfg(steps=10**6, minutes=1e-9)
    run = TrainingRun(tmp_path, _model(), cfg, {})
    run_loop(run, _step(run))
    assert run.step == 0


def test_evaluation_sees_the_average_and_is_logged(tmp_path):
    run = _begin(tmp_path)
    run_loop(run, _step(run), evaluate=lambda: {"figure": 7.0}, evaluate_every=6)
    assert [line["step"] for line in _log(tmp_path) if "val/figure" in line] == [6, 12]
    assert [line["twice"] for line in _log(tmp_path) if "twice" in line] == [2, 8, 14, 20]  # means of three


@pytest.mark.parametrize(
    ("precision", "has_it", "half"),
    [(None, True, True), (None, False, False), ("bfloat16", False, True), ("float32", True, False)],
)
def test_products_are_in_bfloat16_where_that_is_faster_or_asked_for(monkeypatch, precision, has_it, half):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_it)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    with RunCfg(precision=precision).autocast("cpu"):
        assert torch.mm(torch.ones(2, 3), torch.ones(3, 4)).dtype == (
            torch.bfloat16 if half else torch.float32
        )


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["minutes", "budget_minutes", "lr"])
def test_numbers_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(L2MError, match=rf"^RunCfg\.{name}: expected a number"):
        RunCfg(**{name: value})
