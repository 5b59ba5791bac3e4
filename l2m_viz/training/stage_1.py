"""Stage 1 from photos to files of weights: the 2D encoder in OUT/2d, then the 3D-aware one in OUT/3d."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from l2m_viz.data.files import atomic_write
from l2m_viz.encoders.shipped import read_weights
from l2m_viz.encoders.weights import State
from l2m_viz.errors import L2MError
from l2m_viz.gaussians.lift_features import Method
from l2m_viz.training.run import start_accelerator
from l2m_viz.training.train_encoder import (
    WEIGHTS,
    EncoderTrainingCfg,
    PretrainingCfg,
    Report,
    pretrain_encoder,
    train_encoder,
)

Stage = Literal["2d", "3d", "both"]


@dataclass(frozen=True)
class StageOneCfg:
    """Both parts.

    Attributes:
        name: Of the 3D-aware encoder and its file; the 2D one's ends in "-2d".
        training: From the 2D encoder to the 3D-aware one.
        pretraining: From nothing to the 2D encoder; None for a network that is published.
        stage: "2d" or "3d" alone, or the one after the other.
        minutes: Stop after so many, in all; nothing is lost.
    """

    name: str
    training: EncoderTrainingCfg
    pretraining: PretrainingCfg | None = None
    stage: Stage = "both"
    minutes: float | None = None


@dataclass(frozen=True)
class StageOneOptions:
    """What a user may choose; None keeps the preset's.

    Attributes:
        encoder: What is trained; DINOv2 is a 2D encoder already.
        stage: "2d" or "3d" alone, or the one after the other.
        features: How the teacher's features come into the Gaussians: their mean, or FiT3D's optimisation.
        contrast: Weight of telling apart the rendered features of different places.
        minutes: Stop after so many minutes in all; the run can go on later.
        pretrain_steps: Optimiser steps of the 2D encoder.
        steps: Optimiser steps of the 3D-aware one.
        workers: Processes that make pairs or scenes; 0 makes them in between.
    """

    encoder: Literal["l2m-tiny", "dinov2-vits14"] = "l2m-tiny"
    stage: Stage = "both"
    features: Method = "closed-form"
    contrast: float | None = None
    minutes: float | None = None
    pretrain_steps: int | None = None
    steps: int | None = None
    workers: int = 1

    def applied_to(self, cfg: StageOneCfg) -> StageOneCfg:
        """The settings with these choices."""
        training, pretraining = cfg.training, cfg.pretraining
        training = replace(
            training,
            run=replace(training.run, steps=self.steps or training.run.steps),
            goals=replace(training.goals, method=self.features),
            contrast_weight=training.contrast_weight if self.contrast is None else self.contrast,
            workers=self.workers,
        )
        if pretraining is not None:
            run = replace(pretraining.run, steps=self.pretrain_steps or pretraining.run.steps)
            pretraining = replace(pretraining, run=run, workers=self.workers)
        return StageOneCfg(cfg.name, training, pretraining, self.stage, self.minutes)


def train_stage_1(
    photos: Path,
    out: Path,
    cfg: StageOneCfg,
    *,
    begin_from: State | None = None,
    val_photos: Path | None = None,
    report: Report | None = None,
    say: Callable[[str], None] = print,
    device: str = "cpu",
) -> list[Path]:
    """Train the encoders, or go on where it stopped; return the files of weights that were written.

    Args:
        photos: Folder of photos.
        out: Folder for both runs and the files NAME-2d.safetensors and NAME.safetensors.
        cfg: Settings.
        begin_from: Weights of a 2D encoder to make 3D-aware; then none is trained.
        val_photos: Other photos, whose pairs judge the averaged weights as training goes.
        report: Shown every logged line of numbers.
        say: Told by the main process what begins.
        device: Where the encoder lives.

    Raises:
        L2MError: a part that this network does not have or that lacks the one before, or a run of other settings.
        FileFormatError: weights are another network's.
        ImageError: no photos.
    """
    started, written = time.monotonic(), []
    accelerator = start_accelerator(device)
    tell = say if accelerator.is_main_process else lambda _: None

    def publish(source: Path, name: str) -> Path:
        """Copy a run's weights beside the runs: one process does, all find them there."""
        target = out / f"{name}.safetensors"
        if accelerator.is_main_process:
            with atomic_write(target) as file:
                file.write((source / WEIGHTS).read_bytes())
        accelerator.wait_for_everyone()
        return target

    def left() -> float | None:
        return None if cfg.minutes is None else max(0.0, cfg.minutes - (time.monotonic() - started) / 60)

    if cfg.stage != "3d" and begin_from is None:
        if cfg.pretraining is None:
            todo = "name a file of its published weights to begin from"
            raise L2MError(f"2D encoder of {cfg.name}", expected="its weights", got="none", todo=todo)
        tell(f"2D encoder: {out / '2d'}")
        pretraining = replace(cfg.pretraining, run=replace(cfg.pretraining.run, minutes=left()))
        pretrain_encoder(photos, out / "2d", pretraining, val_photos=val_photos, report=report, device=device)
        written.append(publish(out / "2d", f"{cfg.name}-2d"))
        steps = int(read_weights(written[-1])[1]["steps"])
        if cfg.stage == "both" and steps < pretraining.run.steps:
            tell(
                f"the 2D encoder has {steps} of {pretraining.run.steps} steps; run the same command to go on"
            )
            return written
    if cfg.stage != "2d":
        teacher = begin_from if begin_from is not None else _made_before(out / f"{cfg.name}-2d.safetensors")
        tell(f"3D-aware encoder: {out / '3d'}")
        training = replace(cfg.training, run=replace(cfg.training.run, minutes=left()))
        train_encoder(
            photos, out / "3d", teacher, training, val_photos=val_photos, report=report, device=device
        )
        written.append(publish(out / "3d", cfg.name))
    return written


def _made_before(path: Path) -> State:
    """The 2D encoder as its file has it: what is shipped is what taught."""
    if not path.is_file():
        todo = "train the 2D encoder first, or begin from a file of weights"
        raise L2MError("3D-aware encoder", expected=f"a 2D encoder in {path}", got="none", todo=todo)
    return read_weights(path)[0]
