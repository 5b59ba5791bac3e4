"""What training needs: pairs with exact correspondence from single photos, losses, and both stages."""

from l2m_viz.training.augment import (
    CROSS_MODAL as CROSS_MODAL,
    AugmentCfg as AugmentCfg,
    Effect as Effect,
    augment as augment,
)
from l2m_viz.training.pairs import (
    Pair as Pair,
    PairCfg as PairCfg,
    make_pair as make_pair,
    read_photo as read_photo,
)
from l2m_viz.training.shards import ShardReader as ShardReader
from l2m_viz.training.stream import PairBatch as PairBatch, PairStream as PairStream
