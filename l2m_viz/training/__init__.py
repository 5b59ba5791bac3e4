"""What training needs: pairs with exact correspondence, made from single photos."""

from l2m_viz.training.pairs import Pair as Pair, PairCfg as PairCfg, make_pair as make_pair
