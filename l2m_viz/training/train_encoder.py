"""Stage 1: an encoder that knows one surface from another, and the same surface from everywhere.

First without 3D (``pretrain_encoder``): two views of a photo taken for a flat print, dense contrastive learning; the
"2D encoder" of the paper. Then with 3D (``train_encoder``), after FiT3D (Yue et al., ECCV 2024): lift the photo, let a
frozen copy of the 2D encoder, the teacher, look at several of its views, lift what it says into feature Gaussians, and
teach the student to say at a new view, and at the photo, what the Gaussians render there. The teacher's answers do not
move, so agreeing across views cannot collapse to a constant.

A published network, DINOv2, is a 2D encoder already: there the second part is all.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.encoders.conv_pyramid import ConvPyramid, ConvPyramidCfg
from l2m_viz.encoders.dinov2 import DinoCfg, DinoViT
from l2m_viz.encoders.encoder import NetworkEncoder
from l2m_viz.encoders.imagenet import normalize_imagenet
from l2m_viz.encoders.shipped import save_weights
from l2m_viz.encoders.weights import State, load_strict
from l2m_viz.errors import L2MError
from l2m_viz.evaluation.features import THRESHOLDS_PX, FeaturePckCfg, evaluate_features, photo_pairs
from l2m_viz.geometry import HW
from l2m_viz.lifting import View, ViewSamplerCfg
from l2m_viz.training.augment import AugmentCfg, augment
from l2m_viz.training.contrast import ContrastCfg, pair_contrast
from l2m_viz.training.feature_goals import Goal, GoalCfg, feature_goals, goal_losses
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.run import RunCfg, TrainingRun, run_loop, start_accelerator
from l2m_viz.training.scenes import SceneCfg, SceneStream
from l2m_viz.training.stream import PairStream

Report = Callable[[dict[str, float]], None]
EncoderCfg = ConvPyramidCfg | DinoCfg
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class PretrainingCfg:
    """The 2D encoder: no depth, no parallax."""

    encoder: ConvPyramidCfg = field(default_factory=ConvPyramidCfg)
    run: RunCfg = field(default_factory=lambda: RunCfg(steps=4000))
    pairs: PairCfg = field(
        default_factory=lambda: PairCfg(
            hw=(192, 256),
            depth="flat",
            holes="background",
            p_roll=0.5,
            views=ViewSamplerCfg(roll_deg=(0.0, 45.0)),
        )
    )
    difficulty: tuple[float, float] = (0.2, 1.2)
    augment: AugmentCfg = field(default_factory=AugmentCfg)
    contrast: ContrastCfg = field(default_factory=ContrastCfg)
    batch_size: int = 8
    evaluate_every: int = 500
    workers: int = 1


@dataclass(frozen=True)
class EncoderTrainingCfg:
    """Stage 1 proper."""

    encoder: EncoderCfg = field(default_factory=ConvPyramidCfg)
    run: RunCfg = field(default_factory=lambda: RunCfg(steps=1500, lr=2e-4))
    scenes: SceneCfg = field(default_factory=SceneCfg)
    goals: GoalCfg = field(default_factory=GoalCfg)
    augment: AugmentCfg = field(default_factory=AugmentCfg)
    # Scenes in a step; each gives two views to learn from: a new one and the photo.
    batch_size: int = 4
    # Weight of telling apart the rendered features of different places of a view.
    contrast_weight: float = 0.1
    contrast: ContrastCfg = field(default_factory=ContrastCfg)
    evaluate_every: int = 500
    workers: int = 1


class ContrastiveModel(nn.Module):
    """The encoder and, during pretraining only, a projection of each map in which points are compared.

    Without it, features that are never negative would have to be their own space of comparison: after 150 steps the
    feature PCK at 8 px of held-out photos was 0.43 instead of 0.47, of rgbd frames 0.50 instead of 0.54.
    """

    def __init__(self, cfg: ConvPyramidCfg, dim: int = 128) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = ConvPyramid(cfg)
        self.heads = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in cfg.widths[-2:])

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[int, Float[Tensor, "b d h2 w2"]]:
        """Projected maps by stride."""
        maps = read_maps(self.encoder, images, self.cfg)
        return {stride: head(maps[stride]).float() for stride, head in zip(maps, self.heads, strict=True)}


def pretrain_encoder(
    photos: Path,
    out: Path,
    cfg: PretrainingCfg | None = None,
    *,
    val_photos: Path | None = None,
    report: Report | None = None,
    device: str = "cpu",
) -> ConvPyramid:
    """Train the 2D encoder, or go on with the run in ``out``; return it with its averaged weights.

    Args:
        photos: Folder of photos.
        out: The run's folder.
        cfg: Settings.
        val_photos: Other photos, whose pairs judge the averaged weights as training goes.
        report: Shown every logged line of numbers.
        device: Where the encoder lives; lifting is done on the CPU.

    Raises:
        L2MError: the run in ``out`` has other settings.
        ImageError: no photos.
    """
    cfg = cfg or PretrainingCfg()
    torch.manual_seed(cfg.run.seed)
    accelerator = start_accelerator(device)
    model = ContrastiveModel(cfg.encoder)
    model.to(accelerator.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    run = TrainingRun(out, model, cfg.run, asdict(cfg), accelerator)
    averaged: ConvPyramid = run.ema.module.encoder  # pyright: ignore[reportAssignmentType]
    share = run.share(cfg.batch_size)
    stream = iter(
        PairStream(
            photos,
            cfg.pairs,
            batch_size=share,
            seed=cfg.run.seed,
            num_workers=cfg.workers,
            start=run.step * cfg.batch_size + accelerator.process_index * share,
            stride=cfg.batch_size,
            difficulty=cfg.difficulty,
        )
    )

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        model.train()
        batch = next(stream)
        both = torch.cat([batch.image_A, batch.image_B])
        seeds = torch.cat([batch.seeds // 2 * 2, batch.seeds // 2 * 2 + 1])
        with run.cfg.autocast(accelerator.device):
            maps = run.network(_channels_first(augment(both, cfg.augment, seeds=seeds), run))
        draw = torch.Generator().manual_seed(number)
        truth = batch.warp_A_to_B, batch.covisibility_A_to_B
        losses, hits = zip(
            *(pair_contrast(found, *truth, cfg.contrast, draw) for found in maps.values()), strict=True
        )
        return torch.stack(losses).sum(), {f"hit_{s}": hit for s, hit in zip(maps, hits, strict=True)}

    run_loop(run, step, _judge(run, averaged, cfg.encoder, val_photos), cfg.evaluate_every, report)
    _write(run, averaged, {"stage": "2d"})
    return averaged.eval()


def train_encoder(
    photos: Path,
    out: Path,
    teacher_state: State,
    cfg: EncoderTrainingCfg | None = None,
    *,
    val_photos: Path | None = None,
    report: Report | None = None,
    device: str = "cpu",
) -> nn.Module:
    """Make a 2D encoder 3D-aware, or go on with the run in ``out``; return it with its averaged weights.

    Args:
        photos: Folder of photos.
        out: The run's folder.
        teacher_state: Weights of the 2D encoder: the frozen teacher's, and where the student starts.
        cfg: Settings.
        val_photos: Other photos, whose pairs judge the averaged weights as training goes.
        report: Shown every logged line of numbers.
        device: Where the encoder lives; lifting is done on the CPU.

    Raises:
        L2MError: the run in ``out`` has other settings or another teacher, or views are not whole cells.
        FileFormatError: the teacher's weights are another network's.
        ImageError: no photos.
    """
    cfg = cfg or EncoderTrainingCfg()
    _check_cells(cfg)
    torch.manual_seed(cfg.run.seed)
    accelerator = start_accelerator(device)
    teacher, student = (
        load_strict(make_network(cfg.encoder), teacher_state, "the 2D encoder").to(accelerator.device)
        for _ in range(2)
    )
    teacher.eval().requires_grad_(False)
    student.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    settings = asdict(cfg) | {"teacher": _digest(teacher_state)}
    run = TrainingRun(out, student, cfg.run, settings, accelerator)
    if run.step == 0:
        run.begin_from(teacher.state_dict())
    share, processes = run.share(cfg.batch_size), accelerator.num_processes
    stream = iter(
        SceneStream(
            photos,
            cfg.scenes,
            seed=cfg.run.seed,
            num_workers=cfg.workers,
            start=run.step * cfg.batch_size + accelerator.process_index,
            step=processes,
        )
    )

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        # The norms keep the teacher's statistics: they are those of the features that are to be said.
        student.eval()
        scenes = [next(stream) for _ in range(share)]
        goals = _goals(teacher, scenes, cfg, accelerator.device)
        shown = torch.stack([view.image for view in (*(v[-1] for v in scenes), *(v[0] for v in scenes))])
        seeds = (number * processes + accelerator.process_index) * len(shown) + torch.arange(len(shown))
        with run.cfg.autocast(accelerator.device):
            maps = read_maps(
                run.network, _channels_first(augment(shown, cfg.augment, seeds=seeds), run), cfg.encoder
            )
        draw = torch.Generator().manual_seed(number)
        agree, contrast = (
            torch.stack(terms).mean()
            for terms in zip(
                *(
                    goal_losses(said, wanted, cfg.contrast, draw)
                    for stride, found in maps.items()
                    for said, wanted in zip(found.chunk(2), goals[stride], strict=True)
                ),
                strict=True,
            )
        )
        finest = [goal for half in goals[min(maps)] for goal in half]
        seen = torch.stack([goal.seen.float().mean() for goal in finest]).mean()
        numbers = {"agree": agree.item(), "contrast": contrast.item(), "seen": seen.item()}
        return agree + cfg.contrast_weight * contrast, numbers

    run_loop(run, step, _judge(run, run.ema.module, cfg.encoder, val_photos), cfg.evaluate_every, report)
    _write(run, run.ema.module, {"stage": "3d", "teacher": settings["teacher"]})
    return run.ema.module.eval()


def make_network(cfg: EncoderCfg) -> nn.Module:
    """The encoder's network with fresh weights."""
    if isinstance(cfg, ConvPyramidCfg):
        return ConvPyramid(cfg)
    network = DinoViT(cfg)
    network.mask_token.requires_grad_(False)  # plays no part
    return network


def read_maps(
    network: nn.Module, images: Float[Tensor, "b 3 h w"], cfg: EncoderCfg
) -> dict[int, Float[Tensor, "b d h2 w2"]]:
    """The maps that stage 1 teaches, by stride, the finest first: "the encoder's features".

    Of a pyramid also the coarsest: the matcher's coarse stage reads it.
    """
    if isinstance(cfg, DinoCfg):
        return {cfg.patch_size: network(normalize_imagenet(images)).float()}
    maps = network(images)
    return {stride: maps[stride].float() for stride in cfg.strides[-2:]}


def as_encoder(name: str, network: nn.Module, cfg: EncoderCfg, device: torch.device) -> NetworkEncoder:
    """A network in training as an encoder that can be judged; sides of images are whole cells of all its maps."""
    stride = cfg.patch_size if isinstance(cfg, DinoCfg) else cfg.strides[-2]
    dim = cfg.dim if isinstance(cfg, DinoCfg) else cfg.widths[-2]
    return NetworkEncoder(name, lambda images: read_maps(network, images, cfg)[stride], stride, dim, device)


@torch.no_grad()
def _goals(
    teacher: nn.Module, scenes: list[list[View]], cfg: EncoderTrainingCfg, device: torch.device
) -> dict[int, tuple[list[Goal], list[Goal]]]:
    """For each map: the goals at the new views, and those at the photos."""
    images = (
        torch.stack([view.image for views in scenes for view in views[:-1]]).permute(0, 3, 1, 2).to(device)
    )
    with cfg.run.autocast(device):
        maps = read_maps(teacher, images, cfg.encoder)
    found: dict[int, tuple[list[Goal], list[Goal]]] = {}
    for stride, said in maps.items():
        pairs = [
            feature_goals(features, views[:-1], (views[-1], views[0]), stride, cfg.goals)
            for features, views in zip(said.chunk(len(scenes)), scenes, strict=True)
        ]
        found[stride] = [new for new, _ in pairs], [photo for _, photo in pairs]
    return found


def _channels_first(images: Float[Tensor, "b h w 3"], run: TrainingRun) -> Float[Tensor, "b 3 h w"]:
    return images.to(run.accelerator.device).permute(0, 3, 1, 2)  # strides are channels_last already


def _judge(
    run: TrainingRun, averaged: nn.Module, cfg: EncoderCfg, val_photos: Path | None
) -> Callable[[], dict[str, float]] | None:
    """Feature PCK of the averaged weights on pairs of photos that are not trained on: always the same pairs."""
    if val_photos is None or not run.is_main:
        return None
    cell = cfg.patch_size if isinstance(cfg, DinoCfg) else cfg.strides[-1]
    hw: HW = (192 // cell * cell, 256 // cell * cell)
    pairs = photo_pairs(val_photos, FeaturePckCfg(num_photo_pairs=_JUDGED, hw=hw))

    def judge() -> dict[str, float]:
        encoder = as_encoder("averaged", averaged.eval(), cfg, run.accelerator.device)
        (result,) = evaluate_features(encoder, pairs)
        shares = {f"pck{t:g}": share for t, share in zip(THRESHOLDS_PX, result.pck, strict=True)}
        return {"median_px": result.median_px} | shares

    return judge


_JUDGED = 32  # pairs


def _write(run: TrainingRun, averaged: nn.Module, meta: dict[str, str]) -> None:
    """The averaged weights, as `load_encoder` reads them."""
    if run.is_main:
        meta = meta | {"steps": str(run.step), "minutes": f"{run.trained_seconds / 60:.0f}"}
        small = isinstance(averaged, ConvPyramid)
        save_weights(run.folder / WEIGHTS, averaged.state_dict(), meta, eight_bit=small)


def _check_cells(cfg: EncoderTrainingCfg) -> None:
    cell = cfg.encoder.patch_size if isinstance(cfg.encoder, DinoCfg) else cfg.encoder.strides[-1]
    if any(side % cell for side in cfg.scenes.hw):
        raise L2MError("SceneCfg.hw", expected=f"sides that {cell} divides", got=str(cfg.scenes.hw))


def _digest(state: State) -> str:
    """Tells one teacher from another."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
