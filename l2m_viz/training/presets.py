"""The settings that the shipped weights were trained with."""

from l2m_viz.lifting import ViewSamplerCfg
from l2m_viz.matching.tiny import tiny_cfg
from l2m_viz.training.losses import MatcherLossCfg
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.run import RunCfg
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
            views=ViewSamplerCfg(roll_deg=(0.0, 30.0)),
        ),
        # A share of 0.01, RoMa's, is for networks that train for millions of pairs.
        loss=MatcherLossCfg(certainty_weight=0.05),
        curriculum=Curriculum(low=0.1, high_first=0.5, high_last=1.6, ramp_steps=4000),
        batch_size=8,
        sizes=((192, 256), (256, 192), (224, 224)),
    )
