"""Settings of the trainings; what each run of the shipped weights had instead, `weights/EXPERIMENTS.md` says."""

from collections.abc import Callable
from dataclasses import replace

from l2m_viz.encoders.conv_pyramid import TINY_PYRAMID
from l2m_viz.encoders.dinov2 import DINOV2_VITS14
from l2m_viz.lifting import ViewSamplerCfg
from l2m_viz.lifting.synthesis import SynthesisCfg
from l2m_viz.matching.network import official_cfg
from l2m_viz.matching.tiny import base_cfg, tiny_cfg
from l2m_viz.training.losses import MatcherLossCfg
from l2m_viz.training.occluders import OccluderCfg
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.rims import RimCfg
from l2m_viz.training.run import RunCfg
from l2m_viz.training.scenes import SceneCfg
from l2m_viz.training.stage_1 import StageOneCfg
from l2m_viz.training.train_encoder import EncoderTrainingCfg, PretrainingCfg
from l2m_viz.training.train_matcher import Curriculum, MatcherTrainingCfg


def tiny_matcher() -> MatcherTrainingCfg:
    """Stage 2 of l2m-tiny, for a laptop's CPU: small pictures, all kinds of change between the views."""
    return MatcherTrainingCfg(
        network=tiny_cfg(),
        run=RunCfg(steps=60_000, lr=8e-4, warmup_steps=400, cooldown=0.2),
        pairs=PairCfg(
            holes="background",
            p_fill=0.85,
            p_relight=0.2,
            p_roll=0.3,
            p_orbit=0.4,
            p_surround=0.5,
            views=ViewSamplerCfg(roll_deg=(0.0, 30.0), orbit_deg=(5.0, 30.0)),
        ),
        rims=RimCfg(share=0.2),
        occluders=OccluderCfg(share=0.4),
        # A share of 0.01, RoMa's, is for networks that train for millions of pairs.
        loss=MatcherLossCfg(certainty_weight=0.05),
        curriculum=Curriculum(low=0.1, high_first=0.5, high_last=1.6, ramp_steps=4000),
        batch_size=8,
        refined=0.5,
        sizes=((192, 256), (288, 384), (256, 192), (384, 288)),
    )


def base_matcher() -> MatcherTrainingCfg:
    """Stage 2 of a wider network of l2m-tiny's kind, for one GPU. It was never trained here."""
    return replace(
        tiny_matcher(),
        network=base_cfg(),
        name="l2m-base",
        run=RunCfg(steps=150_000, lr=4e-4, warmup_steps=2000, cooldown=0.2),
        curriculum=Curriculum(low=0.1, high_first=0.5, high_last=1.6, ramp_steps=10_000),
        batch_size=32,
        refined=1.0,
        sizes=((320, 416), (416, 320), (384, 384)),
        workers=4,
    )


def official_matcher() -> MatcherTrainingCfg:
    """RoMa's recipe (Edstedt et al., CVPR 2024, experiments/train_roma_outdoor.py) on lifted photos.

    L2M's own schedule is unpublished. 8 million pairs at 560x560, for several GPUs under `accelerate launch`; VGG19 at
    a twentieth of the rate, DINOv2 frozen. Never run in full here.
    """
    return MatcherTrainingCfg(
        network=official_cfg(),
        name="l2m-official",
        run=RunCfg(steps=250_000, lr=4e-4, warmup_steps=1000, cooldown=0.1, max_grad_norm=0.01),
        pairs=tiny_matcher().pairs,
        rims=tiny_matcher().rims,
        occluders=tiny_matcher().occluders,
        loss=MatcherLossCfg(soft_anchors=False),
        curriculum=Curriculum(low=0.1, high_first=0.5, high_last=1.6, ramp_steps=20_000),
        batch_size=32,
        sizes=((560, 560),),
        encoder_lr=0.05,
        frozen=("encoder.vit",),
        imagenet_normalised=True,
        workers=4,
    )


PRESETS: dict[str, Callable[[], MatcherTrainingCfg]] = {
    "tiny": tiny_matcher,
    "base": base_matcher,
    "official": official_matcher,
}


def tiny_pretraining() -> PretrainingCfg:
    """The 2D encoder of l2m-tiny."""
    return PretrainingCfg(
        encoder=TINY_PYRAMID,
        run=RunCfg(steps=1500, lr=1e-3, warmup_steps=100, cooldown=0.4, ema_decay=0.998),
    )


def tiny_encoder() -> EncoderTrainingCfg:
    """The 3D-aware encoder of l2m-tiny."""
    return EncoderTrainingCfg(
        encoder=TINY_PYRAMID,
        run=RunCfg(steps=1000, lr=3e-4, warmup_steps=50, cooldown=0.4, ema_decay=0.998),
        scenes=SceneCfg(synthesis=_synthesis()),
        # After 60 steps at weights 0 and 1 the feature PCK at 8 px of held-out photos was 0.48 and 0.51 (2D: 0.47).
        contrast_weight=1.0,
    )


def tiny_stage_1() -> StageOneCfg:
    """Both encoders of l2m-tiny."""
    return StageOneCfg("l2m-tiny", tiny_encoder(), tiny_pretraining())


def dinov2_stage_1() -> StageOneCfg:
    """DINOv2's smallest made 3D-aware: FiT3D's learning rate, decay, batch and clipping."""
    run = RunCfg(steps=5000, lr=1e-5, weight_decay=1e-4, max_grad_norm=0.1, warmup_steps=100)
    scenes = SceneCfg(hw=(196, 252), synthesis=_synthesis())
    training = EncoderTrainingCfg(
        encoder=DINOV2_VITS14, run=run, scenes=scenes, batch_size=2, contrast_weight=0.0
    )
    return StageOneCfg("dinov2-vits14", training)


def _synthesis() -> SynthesisCfg:
    views = ViewSamplerCfg(roll_deg=(0.0, 30.0))
    return SynthesisCfg(depth="random-planes", holes="background", views=views)
