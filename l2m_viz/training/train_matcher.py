"""Stage 2: train a dense matcher's network on pairs made from single photos."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.encoders.imagenet import normalize_imagenet
from l2m_viz.encoders.weights import load_strict
from l2m_viz.errors import L2MError
from l2m_viz.evaluation import average_precision
from l2m_viz.geometry import HW
from l2m_viz.matching.network import DenseNetwork, NetworkCfg
from l2m_viz.matching.stages import StageOutput
from l2m_viz.matching.tiny import save_weights
from l2m_viz.training.augment import AugmentCfg, augment
from l2m_viz.training.losses import MatcherLossCfg, StageLoss, matcher_losses, reduce_losses
from l2m_viz.training.occluders import OccluderCfg, with_occluders
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.rims import RimCfg, with_rims
from l2m_viz.training.run import RunCfg, TrainingRun, run_loop, share_of, start_accelerator
from l2m_viz.training.stream import PairBatch, PairStream

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Curriculum:
    """How hard the pairs are: difficulty is drawn from [low, high], whose upper end grows over the first steps."""

    low: float = 0.2
    high_first: float = 0.6
    high_last: float = 2.0
    ramp_steps: int = 3000

    def range_at(self, step: int) -> tuple[float, float]:
        """The range of a step."""
        share = min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0
        return self.low, self.high_first + share * (self.high_last - self.high_first)


@dataclass(frozen=True)
class MatcherTrainingCfg:
    """Everything that defines a stage-2 run, but for the photos."""

    network: NetworkCfg
    # Of the matcher, written into the file of weights.
    name: str = "l2m-tiny"
    run: RunCfg = field(default_factory=RunCfg)
    pairs: PairCfg = field(default_factory=lambda: PairCfg(holes="background"))
    rims: RimCfg = field(default_factory=RimCfg)
    occluders: OccluderCfg = field(default_factory=OccluderCfg)
    augment: AugmentCfg = field(default_factory=AugmentCfg)
    loss: MatcherLossCfg = field(default_factory=MatcherLossCfg)
    curriculum: Curriculum = field(default_factory=Curriculum)
    batch_size: int = 8
    # Sizes (H, W) of the batches, in turn: a network that has seen one shape only does not know another.
    sizes: tuple[HW, ...] = ((256, 256), (224, 288), (288, 224), (192, 320))
    # Share of a batch whose second view is of another photo: nothing is covisible.
    unrelated: float = 0.06
    # Share of a batch's pairs that the refiners see. They learn sooner than the coarse stage and are half of the work.
    refined: float = 1.0
    # Encoder's learning rate over the rest's.
    encoder_lr: float = 1.0
    # Parts that stay as they are, norms included, by the dotted names of their modules.
    frozen: tuple[str, ...] = ()
    # Whether the network expects images without ImageNet's mean and deviation, as VGG and DINOv2 do.
    imagenet_normalised: bool = False
    evaluate_every: int = 1000
    workers: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise L2MError("MatcherTrainingCfg batch_size", expected="at least 1", got=str(self.batch_size))
        if not 0 < self.refined <= 1:
            expected = "a share above 0, at most 1"
            raise L2MError("MatcherTrainingCfg refined", expected=expected, got=f"{self.refined:g}")


@dataclass(frozen=True)
class MatcherTrainingOptions:
    """What a user may choose; None keeps the preset's.

    Attributes:
        preset: "tiny" is l2m-tiny; "base" a wider one for a GPU; "official" the full-size network by RoMa's recipe.
        minutes: Stop after so many minutes; the run can go on later.
        budget_minutes: Train for so many minutes in all, the rate coming down at their end: for a machine that is lent.
        steps: Optimiser steps in all. A run that is under way may be given fewer: then it cools down and ends sooner.
        lr: Learning rate between warm-up and cool-down.
        batch_size: Pairs a step, of all processes together; a GPU is idle with the 8 of "tiny".
        refined: Share of them that the refiners see.
        ramp_steps: Steps over which pairs grow to their full difficulty; 0 suits a start from trained weights.
        freeze_encoder: Leave the encoder as it is.
        workers: Processes that make pairs, for each size of picture; 0 makes them in between.
    """

    preset: Literal["tiny", "base", "official"] = "tiny"
    minutes: float | None = None
    budget_minutes: float | None = None
    steps: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    refined: float | None = None
    ramp_steps: int | None = None
    freeze_encoder: bool = False
    workers: int = 1

    def applied_to(self, cfg: MatcherTrainingCfg) -> MatcherTrainingCfg:
        """The settings with these choices."""
        named = {"steps": self.steps, "lr": self.lr, "budget_minutes": self.budget_minutes}
        chosen = {name: value for name, value in named.items() if value is not None}
        named = {"batch_size": self.batch_size, "refined": self.refined}
        of_batches = {name: value for name, value in named.items() if value is not None}
        ramp_steps = cfg.curriculum.ramp_steps if self.ramp_steps is None else self.ramp_steps
        return replace(
            cfg,
            run=replace(cfg.run, minutes=self.minutes, **chosen),
            curriculum=replace(cfg.curriculum, ramp_steps=ramp_steps),
            frozen=("encoder",) if self.freeze_encoder else cfg.frozen,
            workers=self.workers,
            **of_batches,
        )


def train_matcher(
    photos: Path,
    out: Path,
    cfg: MatcherTrainingCfg,
    *,
    val_photos: Path | None = None,
    begin_from: dict[str, Tensor] | None = None,
    encoder: dict[str, Tensor] | None = None,
    validate: Callable[[DenseNetwork], dict[str, float]] | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    device: str = "cpu",
) -> DenseNetwork:
    """Train a matcher's network, or go on with the run in ``out``; return it with its averaged weights.

    Args:
        photos: Folder of photos to make pairs from.
        out: The run's folder.
        cfg: Settings; a run in ``out`` goes on only under the same ones.
        val_photos: Folder of other photos; their pairs judge the averaged weights as training goes.
        begin_from: Weights of the same network to start from.
        encoder: Weights of stage 1 to start the encoder from.
        validate: Called with the averaged weights, in evaluation mode, at each evaluation; its figures are logged.
        report: Shown every logged line of numbers.
        device: Where the network lives.

    Raises:
        L2MError: the run in ``out`` has other settings.
        ImageError: no photos.
    """
    PairStream(photos, cfg.pairs, batch_size=1)  # says what is wrong with the photos before a folder is begun
    torch.manual_seed(cfg.run.seed)
    accelerator = start_accelerator(device)
    share_of(cfg.batch_size, accelerator)  # refused before the folder is begun
    network = DenseNetwork(cfg.network).to(  # pyright: ignore[reportCallIssue]
        device=accelerator.device, memory_format=torch.channels_last
    )
    frozen = [network.get_submodule(name).requires_grad_(False) for name in cfg.frozen]
    if encoder is not None:  # a run that goes on takes its own again
        load_strict(network.encoder, encoder, "encoder of stage 1")
    run = TrainingRun(out, network, cfg.run, asdict(cfg), accelerator, {"encoder.": cfg.encoder_lr})
    if begin_from is not None and run.step == 0:
        run.begin_from(begin_from)
    batches = _Batches(photos, cfg, run)
    refined = max(1, round(cfg.refined * batches.pairs))

    def step(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        network.train()
        for part in frozen:
            part.eval()
        batch = batches.next(number)
        image_A, image_B = (_channels_first(image, cfg) for image in (batch.image_A, batch.image_B))
        with cfg.run.autocast(accelerator.device):
            there, back = run.network(image_A, image_B, refined)
        terms, per_stage = _both_directions(there, back, batch, cfg.loss)
        total = terms.pop("total")
        return total, {name: term.detach() for name, term in terms.items()} | _errors(per_stage)

    judges: list[Callable[[DenseNetwork], dict[str, float]]] = [validate] if validate else []
    if val_photos is not None and run.is_main:
        judges.append(_Judge(val_photos, cfg, device))

    def evaluate() -> dict[str, float]:
        averaged: DenseNetwork = run.ema.module.eval()  # pyright: ignore[reportAssignmentType]
        return {key: value for judge in judges for key, value in judge(averaged).items()}

    run_loop(run, step, evaluate if judges else None, cfg.evaluate_every, report)
    trained: DenseNetwork = run.ema.module  # pyright: ignore[reportAssignmentType]
    if run.is_main:
        meta = {"name": cfg.name, "steps": str(run.step), "minutes": f"{run.trained_seconds / 60:.0f}"}
        save_weights(out / WEIGHTS, trained.state_dict(), meta)
    return trained


@dataclass(frozen=True)
class Dressing:
    """What pairs get beside geometry, in this order: occluders, rims, light and noise, second views of other photos.

    All of it is a function of the settings and the pairs' seeds; an unrelated view is the next pair's of the batch.
    """

    occluders: OccluderCfg
    rims: RimCfg
    augment: AugmentCfg
    unrelated: float

    def __call__(self, batch: PairBatch) -> PairBatch:
        """The batch as the network sees it."""
        batch = with_rims(with_occluders(batch, self.occluders), self.rims)
        seeds = batch.seeds // 2 * 2
        image_A, image_B = (
            augment(images, self.augment, seeds=seeds + view)
            for view, images in enumerate((batch.image_A, batch.image_B))
        )
        return with_unrelated(replace(batch, image_A=image_A, image_B=image_B), self.unrelated)


class _Batches:
    """This process's share of batch number n of the run: sizes take turns, each with a stream of its own.

    For a GPU a thread fetches the next one while the network is busy with this one.
    """

    def __init__(self, photos: Path, cfg: MatcherTrainingCfg, run: TrainingRun) -> None:
        self._cfg, self._photos, self._device = cfg, photos, run.accelerator.device
        self.pairs = run.share(cfg.batch_size)
        self._offset = run.accelerator.process_index * self.pairs
        self._streams: list[Iterator[PairBatch]] = [
            iter(self._stream(turn, self._turns_before(run.step, turn))) for turn in range(len(cfg.sizes))
        ]
        self._coming: Future[PairBatch] | None = None
        if self._device.type == "cuda":
            self._thread, self._copies = ThreadPoolExecutor(1, "pairs"), torch.cuda.Stream(self._device)

    def next(self, step: int) -> PairBatch:
        if self._device.type != "cuda":
            return next(self._streams[step % len(self._streams)]).to(self._device)
        batch = self._coming.result() if self._coming else self._to_gpu(step)
        self._coming = self._thread.submit(self._to_gpu, step + 1)
        for values in vars(batch).values():
            if (
                isinstance(values, Tensor) and values.is_cuda
            ):  # the copies' stream may not take its memory back yet
                values.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _to_gpu(self, step: int) -> PairBatch:
        with torch.cuda.stream(self._copies):
            batch = next(self._streams[step % len(self._streams)]).to(self._device)
        self._copies.synchronize()
        return batch

    def _turns_before(self, step: int, turn: int) -> int:
        count = len(self._cfg.sizes)
        return step // count + (step % count > turn)

    def _stream(self, turn: int, batches_done: int) -> PairStream:
        cfg, count = self._cfg, len(self._cfg.sizes)

        def difficulty(index: int) -> float:
            low, high = cfg.curriculum.range_at(index // cfg.batch_size * count + turn)
            draw = torch.Generator().manual_seed(index * count + turn)
            return low + (high - low) * torch.rand((), generator=draw).item()

        return PairStream(
            self._photos,
            replace(cfg.pairs, hw=cfg.sizes[turn]),
            batch_size=self.pairs,
            seed=cfg.run.seed * 1000 + turn,
            num_workers=cfg.workers,
            start=batches_done * cfg.batch_size + self._offset,
            stride=cfg.batch_size,
            difficulty=difficulty,
            finish=Dressing(cfg.occluders, cfg.rims, cfg.augment, cfg.unrelated),
        )


class _Judge:
    """Figures on pairs of photos that are not trained on: always the same pairs."""

    def __init__(self, photos: Path, cfg: MatcherTrainingCfg, device: str, batches: int = 8) -> None:
        stream = PairStream(
            photos,
            replace(cfg.pairs, hw=cfg.sizes[0]),
            batch_size=8,
            seed=12345,
            length=batches,
            difficulty=(0.3, 1.5),
        )
        self._batches, self._device, self._cfg = [batch.to(device) for batch in stream], device, cfg

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, float]:
        errors, coarse, scores, labels = [], [], [], []
        for batch in self._batches:
            image_A, image_B = (_channels_first(image, self._cfg) for image in (batch.image_A, batch.image_B))
            with self._cfg.run.autocast(self._device):
                stages, _ = network(image_A, image_B)
            hw = (image_B.shape[-2], image_B.shape[-1])
            losses = matcher_losses(
                stages,
                batch.warp_A_to_B,
                batch.covisibility_A_to_B,
                hw,
                self._cfg.loss,
            )
            errors.append(losses[-1].epe_px[losses[-1].covisible])
            coarse.append(losses[0].epe_px[losses[0].covisible])
            scores.append(stages[-1].certainty_logit[:, 0][:, ::4, ::4].flatten().float())
            labels.append(losses[-1].covisible[:, ::4, ::4].flatten())
        fine, rough = torch.cat(errors), torch.cat(coarse)
        return {
            "epe_px": fine.median().item(),
            "pck1": (fine < 1).float().mean().item(),
            "pck3": (fine < 3).float().mean().item(),
            "coarse_right": (rough < 16).float().mean().item(),
            "ap": average_precision(torch.cat(scores), torch.cat(labels)),
        }


def _channels_first(images: Float[Tensor, "b h w 3"], cfg: MatcherTrainingCfg) -> Float[Tensor, "b 3 h w"]:
    images = images.permute(0, 3, 1, 2)  # strides are channels_last already
    return normalize_imagenet(images) if cfg.imagenet_normalised else images


def with_unrelated(batch: PairBatch, share: float) -> PairBatch:
    """Give some pairs, chosen by their seeds, the next pair's second view: then they are covisible nowhere."""
    unrelated = (batch.seeds % 1000) < 1000 * share
    if len(unrelated) < 2 or not unrelated.any():
        return batch
    keep = ~unrelated[:, None, None]
    return replace(
        batch,
        image_B=torch.where(unrelated[:, None, None, None], batch.image_B.roll(-1, dims=0), batch.image_B),
        covisibility_A_to_B=batch.covisibility_A_to_B & keep,
        covisibility_B_to_A=batch.covisibility_B_to_A & keep,
    )


def _both_directions(
    there: list[StageOutput], back: list[StageOutput], batch: PairBatch, cfg: MatcherLossCfg
) -> tuple[dict[str, Tensor], list[StageLoss]]:
    hw = (batch.image_A.shape[1], batch.image_A.shape[2])
    forward = matcher_losses(there, batch.warp_A_to_B, batch.covisibility_A_to_B, hw, cfg)
    backward = matcher_losses(back, batch.warp_B_to_A, batch.covisibility_B_to_A, hw, cfg)
    one, other = reduce_losses(forward, cfg), reduce_losses(backward, cfg)
    return {key: 0.5 * (one[key] + other[key]) for key in one}, forward


def _errors(losses: list[StageLoss]) -> dict[str, Tensor]:
    """Median end-point error of the first and the last stage, in pixels; NaN (not averaged) without truth."""
    found = {}
    for name, loss in (("coarse", losses[0]), ("fine", losses[-1])):
        found[f"epe_{name}_px"] = torch.where(loss.covisible, loss.epe_px, torch.nan).nanmedian().detach()
    return found
