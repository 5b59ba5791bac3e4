"""A training run in a folder: checkpoints that survive kill -9, running averages of the weights, schedule and log.

Both stages use it. A run is a folder with ``run.json`` (its settings), ``checkpoint.pt`` (everything that the next step
depends on), ``log.jsonl`` (one line a report; TensorBoard events beside it). Started again in the same folder it goes
on as if it had not stopped. Under torchrun or `accelerate launch` several processes make one run: each has its share of
every batch, gradients are averaged, and the first one writes.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from l2m_viz.data.files import atomic_write, write_text
from l2m_viz.encoders.weights import load_strict
from l2m_viz.errors import FileFormatError, L2MError, MissingError
from l2m_viz.matching.matcher import Precision, fastest_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

_CHECKPOINT, _SETTINGS, _LOG = "checkpoint.pt", "run.json", "log.jsonl"


@dataclass(frozen=True)
class RunCfg:
    """How long, how fast, and how often to save."""

    # Optimiser steps in all.
    steps: int = 20_000
    # Stop after this many minutes of this session; the run can go on later.
    minutes: float | None = None
    # Train for this many minutes in all sessions together, cool-down included, if the steps do not end it before. The
    # evaluation at the end comes on top.
    budget_minutes: float | None = None
    # AdamW's learning rate between warm-up and cool-down.
    lr: float = 6e-4
    # Steps of linear warm-up; also after a restart from weights alone.
    warmup_steps: int = 300
    # Share of the steps, at the end, over which the rate falls to a hundredth along a cosine.
    cooldown: float = 0.25
    weight_decay: float = 0.01
    # Gradients longer than this are shortened.
    max_grad_norm: float = 1.0
    # Weight of the past in the running average of the weights; ramped up from 0 at the start.
    ema_decay: float = 0.999
    # Of the products where bfloat16 is safe; sums, geometry and losses stay in float32. None: the fastest here.
    precision: Precision | None = None
    # Save at least this often.
    checkpoint_minutes: float = 4.0
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "log_every", "checkpoint_minutes", "budget_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise L2MError(f"RunCfg.{name}", expected="a number above 0", got=str(value))
        if (
            self.minutes is not None and not 0 <= self.minutes < math.inf
        ):  # 0: the stage before may have left nothing
            raise L2MError("RunCfg.minutes", expected="a number, 0 or more", got=str(self.minutes))

    def lr_at(self, step: int, spent: float = 0.0) -> float:
        """Learning rate of a step: warm-up, level, cool-down.

        Args:
            step: Its number.
            spent: Share of the budget of minutes that is used up.
        """
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        share = max(step / self.steps, spent)
        into = (share - (1 - self.cooldown)) / max(1 / self.steps, self.cooldown)
        fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, into))))
        return self.lr * rise * fall

    def autocast(self, device: torch.device | str) -> torch.autocast:
        """The context in which a network of the run is called."""
        device = torch.device(device)
        precision = self.precision or fastest_precision(device)
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class TrainingRun:
    """State of one run: model, its running average, optimiser, step.

    Attributes:
        model: What is trained.
        network: What a step calls: the model, or under several processes its wrapper that averages gradients.
        ema: The running average of the weights.
        accelerator: Knows the processes and this one's device.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        cfg: RunCfg,
        settings: dict[str, Any],
        accelerator: "Accelerator | None" = None,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        """Begin a run, or go on with the one in the folder.

        Args:
            folder: The run's own folder.
            model: What is trained, on its device; its weights are overwritten when the run goes on.
            cfg: Settings of the loop.
            settings: All that defines the run, JSON-able; a run goes on only under the same ones, but for those that
                say when to stop.
            accelerator: See `start_accelerator`; None makes one for the CPU.
            lr_scales: Factors on the learning rate of parameters whose names begin so.

        Raises:
            L2MError: the folder holds a run with other settings.
            FileFormatError: its checkpoint is damaged.
        """
        self.folder, self.model, self.cfg = folder, model, cfg
        self.accelerator = accelerator or start_accelerator("cpu")
        self.step = 0
        groups, self._lr_scales = _groups(model, cfg, lr_scales or {})
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.99))
        self.ema = AveragedModel(
            model,
            multi_avg_fn=_ramped_average(cfg.ema_decay),  # pyright: ignore[reportArgumentType]
            use_buffers=True,
        ).requires_grad_(False)
        self._started = self._saved_at = time.monotonic()
        self._base_seconds = 0.0
        self._agree(settings)
        self._board = _tensorboard(folder) if self.is_main else None
        if (folder / _CHECKPOINT).is_file():
            self._load()
        if self.budget_spent >= 1 and self.is_main:
            had = f"trained for {self.trained_seconds / 60:.0f} of {cfg.budget_minutes:g} minutes"
            warnings.warn(f"run in {folder}: {had}; give it a larger budget to go on", stacklevel=2)
        self.network: nn.Module = self.accelerator.prepare_model(model)

    def begin_from(self, state: dict[str, Tensor]) -> None:
        """Take weights alone, as from a shipped file: model and average start there, and the rate warms up anew.

        Raises:
            FileFormatError: they are another network's; names the parameters.
        """
        load_strict(self.model, state, "the network that is trained")
        self.ema.module.load_state_dict(state)
        self.ema.n_averaged.fill_(1)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that evaluates and writes."""
        return self.accelerator.is_main_process

    def share(self, batch_size: int) -> int:
        """This process's part of a batch.

        Raises:
            L2MError: the processes cannot share it evenly.
        """
        return share_of(batch_size, self.accelerator)

    def update(self, loss: Tensor) -> dict[str, Tensor | float]:
        """One optimiser step from a loss; a loss or gradient that is not finite is skipped and counted.

        The numbers stay where they are: read at once, each would have the host wait for a GPU.

        Every process comes to the same decision: gradients are averaged on the way back, and so is the loss.
        """
        rate = self.cfg.lr_at(self.step, self.budget_spent)
        for group, scale in zip(self.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = rate * scale
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
        mean: Tensor = self.accelerator.reduce(loss.detach(), "mean")  # pyright: ignore[reportAssignmentType]
        finite = bool(torch.isfinite(norm) & torch.isfinite(mean))
        if finite:
            self.optimizer.step()
            self.ema.update_parameters(self.model)
        self.step += 1
        return {"loss": mean, "grad_norm": norm, "skipped": float(not finite), "lr": rate}

    @property
    def done(self) -> bool:
        """All steps made, the budget spent, or this session's minutes used up by the clock of any process."""
        if self.step >= self.cfg.steps or self.budget_spent >= 1:
            return True
        if self.cfg.minutes is None:
            return False
        late = (time.monotonic() - self._started) / 60 >= self.cfg.minutes
        return self._over_processes(float(late)) > 0

    @property
    def budget_spent(self) -> float:
        """Share of the budget of minutes that is used up: the same in every process, from 0 to 1 and beyond."""
        if self.cfg.budget_minutes is None:
            return 0.0
        return self._over_processes(self.trained_seconds / 60 / self.cfg.budget_minutes)

    def _over_processes(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        mean: Tensor = self.accelerator.reduce(  # pyright: ignore[reportAssignmentType]
            torch.tensor(value, device=self.accelerator.device), "mean"
        )
        return mean.item()

    @property
    def trained_seconds(self) -> float:
        """Time spent in all sessions of the run."""
        return self._base_seconds + time.monotonic() - self._started

    def save_if_due(self) -> None:
        """Write a checkpoint if the last one is old."""
        if time.monotonic() - self._saved_at > 60 * self.cfg.checkpoint_minutes:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, atomically, if this is the main process."""
        if not self.is_main:
            return
        state = {
            "step": self.step,
            "seconds": self.trained_seconds,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        with atomic_write(self.folder / _CHECKPOINT) as file:
            torch.save(state, file)
        self._saved_at = time.monotonic()

    def log(self, numbers: dict[str, float]) -> None:
        """Append a line of numbers to the log, if this is the main process."""
        if not self.is_main:
            return
        line = {"step": self.step, "minutes": round(self.trained_seconds / 60, 2)} | {
            key: round(value, 6) for key, value in numbers.items()
        }
        with (self.folder / _LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, self.step)

    def _load(self) -> None:
        path = self.folder / _CHECKPOINT
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.step, self._base_seconds = int(state["step"]), float(state["seconds"])
        except Exception as error:  # torch.load raises anything on a damaged file
            todo = "the file is damaged or of another network; begin in another folder"
            got = f"{type(error).__name__}: {error}"
            raise FileFormatError(f"cannot resume from {path}", got=got[:300], todo=todo) from error
        if self.is_main:
            _truncate_log(self.folder / _LOG, self.step)

    def _agree(self, settings: dict[str, Any]) -> None:
        """Settings of a run do not change under way; those that only say when to stop may."""
        path, mine = self.folder / _SETTINGS, json.loads(json.dumps(settings))
        if path.is_file():
            theirs = json.loads(path.read_text())
            if changed := sorted(_differences(theirs, mine)):
                todo = "use the same settings to go on, or another folder for a new run"
                raise L2MError(
                    f"run in {self.folder}", expected="its own settings", got=f"other {changed}", todo=todo
                )
        if self.is_main:
            write_text(path, json.dumps(mine, indent=1))


def share_of(batch_size: int, accelerator: "Accelerator") -> int:
    """One process's part of a batch.

    Raises:
        L2MError: the processes cannot share it evenly.
    """
    processes = accelerator.num_processes
    if batch_size % processes:
        expected = f"a batch that {processes} processes share evenly"
        raise L2MError("training", expected=expected, got=str(batch_size))
    return batch_size // processes


def start_accelerator(device: str) -> "Accelerator":
    """Join the processes that `accelerate launch` (or torchrun) started; without it there is this one alone.

    Args:
        device: "cpu", or "cuda" for this process's own GPU.

    Raises:
        MissingError: the package accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        todo = "pip install 'l2m-viz[training]'"
        raise MissingError(
            "training", expected="the package accelerate", got=str(error), todo=todo
        ) from error
    return Accelerator(
        cpu=device == "cpu", mixed_precision="no"
    )  # the trainings say themselves where bfloat16 is safe


def is_main_process() -> bool:
    """Whether this process speaks for all that torchrun or `accelerate launch` started; known before they meet."""
    return int(os.environ.get("RANK", "0")) == 0


def run_loop(
    run: TrainingRun,
    step: Callable[[int], tuple[Tensor, Mapping[str, Tensor | float]]],
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    report: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Make steps until the run is done; report means since the last report; save often, and at the end.

    Args:
        run: The run.
        step: Computes the loss of step number n, and further numbers to log.
        evaluate: Computes figures to log with the averaged weights.
        evaluate_every: Steps between evaluations; 0 only evaluates at the end.
        report: Shown every logged line, by the main process.
    """
    if not run.is_main:
        evaluate = report = None
    sums: dict[str, list[Tensor | float]] = {}
    evaluated = -1
    try:
        while not run.done:
            started = time.perf_counter()
            loss, numbers = step(run.step)
            updated = run.update(loss)
            seconds = {"seconds_a_step": time.perf_counter() - started}
            for key, value in (dict(numbers) | updated | seconds).items():
                sums.setdefault(key, []).append(value)
            if run.step % run.cfg.log_every == 0:
                line = {key: _mean(values) for key, values in sums.items()}
                sums = {}
                run.log(line)
                if report:
                    report({"step": run.step} | line)
            # What an evaluation takes of a budget in the cool-down, the rate would have to jump over.
            cooling = run.budget_spent > 1 - run.cfg.cooldown
            if evaluate and evaluate_every and run.step % evaluate_every == 0 and not cooling:
                _evaluate(run, evaluate, report)
                evaluated = run.step
            run.save_if_due()
        if evaluate and evaluated != run.step:
            _evaluate(run, evaluate, report)
    finally:
        run.save()


def _tensorboard(folder: Path) -> Any:  # noqa: ANN401 (an optional package)
    """A writer of TensorBoard events into the run's folder, or None where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder)


def print_numbers(numbers: dict[str, float]) -> None:
    """Print a report as one line."""
    step, *rest = numbers.items()
    print(f"{step[0]} {step[1]:g}:", *(f"{key} {value:.4g}" for key, value in rest), flush=True)


def _evaluate(
    run: TrainingRun, evaluate: Callable[[], dict[str, float]], report: Callable[..., None] | None
) -> None:
    figures = {f"val/{key}": value for key, value in evaluate().items()}
    run.log(figures)
    if report:
        report({"step": run.step} | figures)


def _ramped_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Exponential average whose memory grows from ten steps to 1 / (1 - decay): the first steps are soon forgotten."""

    def average(mean: list[Tensor], now: list[Tensor], num_averaged: Tensor) -> None:
        if mean[0].is_floating_point():
            count = int(num_averaged)
            get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(mean, now, num_averaged)
            return
        for old, new in zip(mean, now, strict=True):
            old.copy_(new)  # counters of batch norms

    return average


def _groups(
    model: nn.Module, cfg: RunCfg, lr_scales: Mapping[str, float]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Groups of parameters and the factor on each one's rate. Matrices decay; biases, norms and scalars do not."""
    members: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = next((f for prefix, f in lr_scales.items() if name.startswith(prefix)), 1.0)
            members.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
    groups = [
        {"params": some, "weight_decay": cfg.weight_decay if decays else 0.0}
        for (_, decays), some in members.items()
    ]
    return groups, [scale for scale, _ in members]


def _mean(values: "list[Tensor | float]") -> float:
    finite = [value for value in map(float, values) if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else float("nan")


def _differences(theirs: dict[str, Any], mine: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key in theirs.keys() | mine.keys():
        a, b = theirs.get(key), mine.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{prefix}{key}.")
        elif a != b and key not in _MAY_CHANGE:
            found.add(f"{prefix}{key}")
    return found


# Fewer steps in all than planned bring the cool-down forward: how a run that has to end is ended well.
_MAY_CHANGE = (
    "steps",
    "minutes",
    "budget_minutes",
    "checkpoint_minutes",
    "log_every",
    "workers",
    "photos",
    "val_photos",
)


def _truncate_log(path: Path, step: int) -> None:
    """Drop lines that were written after the checkpoint: they will come again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        write_text(path, "".join(line + "\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off in the middle
        return math.inf
