"""Which matchers there are, and how to get one."""

from collections.abc import Callable
from dataclasses import dataclass

from l2m_viz.errors import MissingError
from l2m_viz.matching.classical import DisMatcher, SiftMatcher
from l2m_viz.matching.matcher import Matcher


@dataclass(frozen=True)
class MatcherInfo:
    """One line of `list_matchers`."""

    name: str
    kind: str  # "dense" or "sparse"
    summary: str


_MATCHERS: dict[str, tuple[MatcherInfo, Callable[[], Matcher]]] = {
    info.name: (info, make)
    for info, make in (
        (MatcherInfo("dis", "dense", "DIS optical flow both ways: small motion, sub-pixel"), DisMatcher),
        (
            MatcherInfo("sift", "sparse", "RootSIFT, mutual nearest neighbours, ratio test: textured scenes"),
            SiftMatcher,
        ),
    )
}


def list_matchers() -> list[MatcherInfo]:
    """All matchers that run here and now."""
    return [info for info, _ in _MATCHERS.values()]


def load_matcher(name: str) -> Matcher:
    """Make a matcher by its name.

    Raises:
        MissingError: there is no such matcher.
    """
    if name not in _MATCHERS:
        raise MissingError(f"no matcher named '{name}'", expected=f"one of {', '.join(_MATCHERS)}")
    return _MATCHERS[name][1]()
