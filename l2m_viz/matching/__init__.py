"""Dense matching: the `Match` that every matcher returns, and the matchers."""

from l2m_viz.matching.classical import DisMatcher as DisMatcher, SiftMatcher as SiftMatcher
from l2m_viz.matching.match import (
    NO_OVERLAP as NO_OVERLAP,
    Direction as Direction,
    Match as Match,
    Matches as Matches,
    Stage as Stage,
)
from l2m_viz.matching.matcher import Matcher as Matcher
from l2m_viz.matching.reconstruction import (
    NamedMatch as NamedMatch,
    write_colmap as write_colmap,
    write_hloc as write_hloc,
)
from l2m_viz.matching.registry import (
    MatcherInfo as MatcherInfo,
    list_matchers as list_matchers,
    load_matcher as load_matcher,
)
