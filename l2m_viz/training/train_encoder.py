"""Stage 1: an encoder that knows one surface from another, and the same surface from everywhere.

First without 3D (``pretrain_encoder``): two views of a photo taken for a flat print, dense contrastive learning; the
"2D encoder" of the paper. Then with 3D (``train_encoder``), after FiT3D (Yue et al., ECCV 2024): lift the photo, let a
frozen copy of the 2D encoder, the teacher, look at several of its views, lift what it says into feature Gaussians, and
teach the student to say at a new view what the Gaussians render there. The teacher's answers do not move, so agreeing
across views cannot collapse to a constant.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_viz.encoders.conv_pyramid import ConvPyramid, ConvPyramidCfg
from l2m_viz.gaussians import FeatureView, Gaussians, gaussians_from_depth, lift_features, rasterize
from l2m_viz.geometry import HW
from l2m_viz.lifting import View, ViewSamplerCfg
from l2m_viz.training.augment import AugmentCfg, augment
from l2m_viz.training.losses import truth_at_stride
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.run import RunCfg, TrainingRun, run_loop
from l2m_viz.training.scenes import SceneCfg, SceneStream
from l2m_viz.training.stream import PairBatch, PairStream

Report = Callable[[dict[str, float]], None]
FEATURE_STRIDE = (
    8  # of the map that is "the encoder's features"; the matcher's coarse stage reads the one below it
)


@dataclass(frozen=True)
class ContrastCfg:
    """Dense contrastive learning (InfoNCE, van den Oord et al., 2018)."""

    # Corresponding points drawn from each pair; all others of the batch are what they must differ from.
    points: int = 128
    temperature: float = 0.07


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
    difficulty: tuple[float, float] = (0.2, 1.5)
    augment: AugmentCfg = field(default_factory=AugmentCfg)
    contrast: ContrastCfg = field(default_factory=ContrastCfg)
    batch_size: int = 8
    workers: int = 1


@dataclass(frozen=True)
class EncoderTrainingCfg:
    """Stage 1 proper."""

    encoder: ConvPyramidCfg = field(default_factory=ConvPyramidCfg)
    run: RunCfg = field(default_factory=lambda: RunCfg(steps=1500, lr=2e-4))
    scenes: SceneCfg = field(default_factory=SceneCfg)
    augment: AugmentCfg = field(default_factory=AugmentCfg)
    # Scenes in a step; each gives one new view to learn from.
    batch_size: int = 4
    # Cells that the Gaussians cover less than this teach nothing.
    min_alpha: float = 0.9
    # Weight of telling apart the rendered features of different places of the new view.
    contrast_weight: float = 0.1
    contrast: ContrastCfg = field(default_factory=ContrastCfg)
    workers: int = 1


class ContrastiveModel(nn.Module):
    """The encoder and, during pretraining only, a projection in which points are compared."""

    def __init__(self, cfg: ConvPyramidCfg, dim: int = 128) -> None:
        super().__init__()
        self.encoder = ConvPyramid(cfg)
        width, coarse = self.encoder.channels[FEATURE_STRIDE], self.encoder.strides[-1]
        self.fine = nn.Conv2d(width, dim, 1)
        self.coarse = nn.Conv2d(self.encoder.channels[coarse], dim, 1)
        self.strides = (FEATURE_STRIDE, coarse)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[int, Float[Tensor, "b d h2 w2"]]:
        """Projected maps at both strides, of unit length."""
        maps = self.encoder(images)
        heads = zip(self.strides, (self.fine, self.coarse), strict=True)
        return {stride: F.normalize(head(maps[stride]).float(), dim=1) for stride, head in heads}


def pretrain_encoder(
    photos: Path,
    out: Path,
    cfg: PretrainingCfg | None = None,
    *,
    report: Report | None = None,
    device: str = "cpu",
) -> ConvPyramid:
    """Train the 2D encoder, or go on with the run in ``out``; return it with its averaged weights.

    Args:
        photos: Folder of photos.
        out: The run's folder.
        cfg: Settings.
        report: Shown every logged line of numbers.
        device: Where the encoder lives.

    Raises:
        L2MError: the run in ``out`` has other settings.
        ImageError: no photos.
    """
    cfg = cfg or PretrainingCfg()
    torch.manual_seed(cfg.run.seed)
    model = ContrastiveModel(cfg.encoder).to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    run = TrainingRun(out, model, cfg.run, asdict(cfg))
    stream = iter(
        PairStream(
            photos,
            cfg.pairs,
            batch_size=cfg.batch_size,
            seed=cfg.run.seed,
            num_workers=cfg.workers,
            start=run.step * cfg.batch_size,
            difficulty=cfg.difficulty,
        )
    )

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        model.train()
        batch = next(stream)
        both = torch.cat([batch.image_A, batch.image_B]).to(device)
        seeds = torch.cat([batch.seeds // 2 * 2, batch.seeds // 2 * 2 + 1])
        images = augment(both, cfg.augment, seeds=seeds).permute(0, 3, 1, 2)
        with torch.autocast(device, torch.bfloat16, enabled=cfg.run.bf16):
            maps = model(images)
        draw = torch.Generator().manual_seed(number)
        losses, hits = zip(
            *(pair_contrast(maps[s], batch, s, cfg.contrast, draw) for s in model.strides), strict=True
        )
        return torch.stack(losses).sum(), {f"hit_{s}": h for s, h in zip(model.strides, hits, strict=True)}

    run_loop(run, step, report=report)
    return run.ema.module.encoder  # pyright: ignore[reportReturnType]


def train_encoder(
    photos: Path,
    out: Path,
    teacher_state: dict[str, Tensor],
    cfg: EncoderTrainingCfg | None = None,
    *,
    report: Report | None = None,
    device: str = "cpu",
) -> ConvPyramid:
    """Make the 2D encoder 3D-aware, or go on with the run in ``out``; return it with its averaged weights.

    Args:
        photos: Folder of photos.
        out: The run's folder.
        teacher_state: Weights of the 2D encoder: the frozen teacher's, and where the student starts.
        cfg: Settings.
        report: Shown every logged line of numbers.
        device: Where the encoder lives.

    Raises:
        L2MError: the run in ``out`` has other settings.
        ImageError: no photos.
    """
    cfg = cfg or EncoderTrainingCfg()
    torch.manual_seed(cfg.run.seed)
    teacher, student = (ConvPyramid(cfg.encoder) for _ in range(2))
    teacher.load_state_dict(teacher_state)
    student.load_state_dict(teacher_state)
    teacher.eval().requires_grad_(False)
    student.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    run = TrainingRun(out, student, cfg.run, asdict(cfg))
    if run.step == 0:
        run.begin_from(teacher_state)
    stream = iter(
        SceneStream(
            photos, cfg.scenes, seed=cfg.run.seed, num_workers=cfg.workers, start=run.step * cfg.batch_size
        )
    )

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        # The norms keep the teacher's statistics: a batch of four new views is too few to measure them again.
        student.eval()
        scenes = [next(stream) for _ in range(cfg.batch_size)]
        goals = [feature_goal(teacher, views, cfg.min_alpha) for views in scenes]
        images = torch.stack([views[-1].image for views in scenes]).to(device)
        seeds = torch.arange(len(scenes)) + number * cfg.batch_size
        images = augment(images, cfg.augment, seeds=seeds).permute(0, 3, 1, 2)
        with torch.autocast(device, torch.bfloat16, enabled=cfg.run.bf16):
            features = student(images)[FEATURE_STRIDE].permute(0, 2, 3, 1).float()
        draw = torch.Generator().manual_seed(number)
        terms = [
            goal_losses(said, goal.to(device), seen.to(device), cfg.contrast, draw)
            for said, (goal, seen) in zip(features, goals, strict=True)
        ]
        agree, contrast = (torch.stack(parts).mean() for parts in zip(*terms, strict=True))
        share = torch.stack([seen.float().mean() for _, seen in goals]).mean()
        loss = agree + cfg.contrast_weight * contrast
        return loss, {"agree": agree.item(), "contrast": contrast.item(), "seen": share.item()}

    run_loop(run, step, report=report)
    return run.ema.module  # pyright: ignore[reportReturnType]


def pair_contrast(
    maps: Float[Tensor, "b2 d h w"], batch: PairBatch, stride: int, cfg: ContrastCfg, draw: torch.Generator
) -> tuple[Tensor, float]:
    """InfoNCE of corresponding points, both ways, and the share of points whose nearest feature is their own.

    Args:
        maps: Unit features of images A, then of images B.
        batch: The pairs.
        stride: Of the maps.
        cfg: Settings.
        draw: Draws the points.
    """
    of_A, of_B = maps.chunk(2)
    target, seen = truth_at_stride(
        batch.warp_A_to_B.to(maps.device), batch.covisibility_A_to_B.to(maps.device), stride
    )
    found_A, found_B = [], []
    for a, b, xy, mask in zip(of_A, of_B, target, seen, strict=True):
        cells = mask.flatten().nonzero()[:, 0]
        cells = cells[torch.randperm(len(cells), generator=draw)[: cfg.points].to(cells.device)]
        grid = xy.flatten(1)[:, cells].T[None, None]  # [1 1 n 2]
        found_A.append(a.flatten(1)[:, cells].T)
        found_B.append(F.grid_sample(b[None], grid, align_corners=False, padding_mode="border")[0, :, 0].T)
    return info_nce(torch.cat(found_A), F.normalize(torch.cat(found_B), dim=1), cfg.temperature)


def info_nce(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], temperature: float) -> tuple[Tensor, float]:
    """Cross-entropy of picking the partner among all, both ways, and how often the most similar one is the partner."""
    if len(a) < 2:
        return (a * 0).sum(), float("nan")
    scores = a @ b.T / temperature
    own = torch.arange(len(a), device=a.device)
    loss = 0.5 * (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own))
    return loss, (scores.argmax(dim=1) == own).float().mean().item()


@torch.no_grad()
def feature_goal(
    teacher: nn.Module, views: list[View], min_alpha: float
) -> tuple[Float[Tensor, "h w d"], Bool[Tensor, "h w"]]:
    """What the feature Gaussians of all but the last view render at the last one, and where they were seen.

    The teacher looks at every view but the last; each Gaussian gets the weighted mean of what it said there.
    """
    *known, new = views
    own = known[0]
    gaussians = gaussians_from_depth(own.image, own.depth, own.camera.K)
    images = torch.stack([view.image for view in known]).permute(0, 3, 1, 2)
    features = teacher(images)[FEATURE_STRIDE].permute(0, 2, 3, 1).float()
    seen_by = [
        FeatureView(
            view.camera, feature, mask=_whole_cells(~view.hole_mask & ~view.inpainted_mask, FEATURE_STRIDE)
        )
        for view, feature in zip(known, features, strict=True)
    ]
    lifted: Gaussians = lift_features(gaussians, seen_by, method="closed-form").gaussians
    height, width = new.image.shape[:2]
    camera = new.camera.resized((height // FEATURE_STRIDE, width // FEATURE_STRIDE))
    render = rasterize(lifted, camera)
    assert render.features is not None
    # What was composited is a sum of weights alpha; their mean is what a pixel that is covered wholly would show.
    goal = render.features / render.alpha[..., None].clamp(min=1e-6)
    real = _whole_cells(~new.hole_mask & ~new.inpainted_mask, FEATURE_STRIDE)
    return goal, (render.alpha > min_alpha) & real


def goal_losses(
    said: Float[Tensor, "h w d"],
    goal: Float[Tensor, "h w d"],
    seen: Bool[Tensor, "h w"],
    cfg: ContrastCfg,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Distance of the student's features from the goal, and InfoNCE between the two over places of this view."""
    a, b = said[seen], goal[seen]
    if len(a) < 2:
        return (said * 0).sum(), (said * 0).sum()
    agree = (a - b).abs().mean() / b.std().clamp(min=1e-6)
    chosen = torch.randperm(len(a), generator=draw)[: cfg.points].to(a.device)
    contrast, _ = info_nce(F.normalize(a[chosen], dim=1), F.normalize(b[chosen], dim=1), cfg.temperature)
    return agree, contrast


def _whole_cells(mask: Bool[Tensor, "h w"], stride: int) -> Bool[Tensor, "h2 w2"]:
    """Cells all of whose pixels are in the mask."""
    hw: HW = (mask.shape[0] // stride, mask.shape[1] // stride)
    return mask.reshape(hw[0], stride, hw[1], stride).all(dim=3).all(dim=1)
