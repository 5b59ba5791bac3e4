"""Which matchers there are, what each needs, and how to get one."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch

from l2m_viz.encoders.weights import Checkpoint, resolve_device
from l2m_viz.errors import L2MError, MissingError, ShapeError
from l2m_viz.geometry import HW
from l2m_viz.matching import sparse
from l2m_viz.matching.classical import DisMatcher, SiftMatcher
from l2m_viz.matching.matcher import Matcher, Precision, fastest_precision
from l2m_viz.matching.tiny import SHIPPED, Shipped, load_tiny, tiny_dense_matcher
from l2m_viz.matching.turned import TurnedMatcher
from l2m_viz.matching.weights import CHECKPOINTS, load_published


@dataclass(frozen=True)
class MatcherInfo:
    """One line of `list_matchers`.

    Attributes:
        name: For `load_matcher`.
        kind: "dense" or "sparse".
        summary: What it is, in one line.
        available: Whether it runs here and now, without a download.
        needs: What is missing and how to get it; empty if nothing is.
        absent_files: Names of the files that are missing.
    """

    name: str
    kind: str
    summary: str
    available: bool = True
    needs: str = ""
    absent_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Options:
    """What a user may choose; None leaves the choice to the matcher."""

    weights: str | Path | None
    backbone_weights: str | Path | None
    resolution: HW | None
    upsample_resolution: HW | None
    precision: Precision | None


@dataclass(frozen=True)
class _Entry:
    kind: str
    summary: str
    load: Callable[[_Options, torch.device], Matcher]
    takes: tuple[str, ...] = ()  # names of the options that mean something to it
    files: tuple[Checkpoint | Shipped, ...] = ()  # what must be on this machine


def _dense(name: str, summary: str) -> _Entry:
    """A published network of RoMa's kind."""
    checkpoint = CHECKPOINTS[name]

    def load(options: _Options, device: torch.device) -> Matcher:
        from l2m_viz.matching.dense import DenseMatcher

        cfg = DenseMatcher.Cfg(
            resolution=options.resolution or checkpoint.resolution,
            upsample_resolution=options.upsample_resolution or checkpoint.upsample_resolution,
            imagenet_normalised=checkpoint.imagenet_normalised,
            precision=options.precision or "float32",
        )
        network = load_published(name, options.weights, options.backbone_weights)
        return DenseMatcher(name, network, cfg, device)

    takes = tuple(field.name for field in fields(_Options))
    return _Entry("dense", summary, load, takes, (checkpoint.decoder, checkpoint.backbone))


def _tiny(options: _Options, device: torch.device) -> Matcher:
    """The network that ships with the package."""
    return tiny_dense_matcher(
        load_tiny(options.weights),
        device,
        resolution=options.resolution,
        upsample_resolution=options.upsample_resolution,
        precision=options.precision,
    )


_PAIR = ("weights", "backbone_weights")

# A matcher of the package's own goes at the head of its kind; what it is loaded from, into `files`.
_MATCHERS: dict[str, _Entry] = {
    "l2m-tiny": _Entry(
        "dense",
        "our small network, trained on single photos alone: wide baselines on a laptop",
        _tiny,
        ("weights", "resolution", "upsample_resolution", "precision"),
        (SHIPPED,),
    ),
    "dis": _Entry("dense", "DIS optical flow both ways: small motion, sub-pixel", lambda *_: DisMatcher()),
    "l2m++": _dense("l2m++", "L2M++ (2026): RoMa's network, trained on lifted single images and videos"),
    "l2m++-v2": _dense("l2m++-v2", "L2M++, second version"),
    "roma-outdoor": _dense(
        "roma-outdoor", "RoMa (CVPR 2024), trained on MegaDepth: landmarks, wide baselines"
    ),
    "roma-indoor": _dense("roma-indoor", "RoMa (CVPR 2024), trained on ScanNet: rooms"),
    "sift": _Entry(
        "sparse", "RootSIFT, mutual nearest neighbours, ratio test: textured scenes", lambda *_: SiftMatcher()
    ),
    "loftr": _Entry(
        "sparse",
        "LoFTR (CVPR 2021) for outdoor scenes: also where there is little texture",
        lambda options, device: sparse.load_loftr(options.weights, device),
        ("weights",),
        (sparse.LOFTR_OUTDOOR,),
    ),
    "disk-lightglue": _Entry(
        "sparse",
        "DISK keypoints and LightGlue (ICCV 2023): fast, wide baselines",
        lambda options, device: sparse.load_disk_lightglue(options.weights, options.backbone_weights, device),
        _PAIR,
        (sparse.DISK_LIGHTGLUE, sparse.DISK_DEPTH),
    ),
    "aliked-lightglue": _Entry(
        "sparse",
        "ALIKED keypoints and LightGlue (ICCV 2023): fast, sub-pixel",
        lambda options, device: sparse.load_aliked_lightglue(
            options.weights, options.backbone_weights, device
        ),
        _PAIR,
        (sparse.ALIKED_LIGHTGLUE, sparse.ALIKED_N16),
    ),
}


def list_matchers() -> list[MatcherInfo]:
    """All matchers, those that run here and now and those that need files first; nothing is loaded or fetched."""
    return [_info(name, entry) for name, entry in _MATCHERS.items()]


def load_matcher(
    name: str,
    device: str | torch.device = "auto",
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    resolution: HW | None = None,
    upsample_resolution: HW | None = None,
    precision: Precision | None = None,
    turns: bool = False,
) -> Matcher:
    """Make a matcher by its name.

    Args:
        name: One of those that `list_matchers` names.
        device: Where its network runs; "auto" is the GPU if torch sees one.
        weights: A file of weights in the published format; None takes the published ones, which are downloaded at
            first use.
        backbone_weights: The same of the DINOv2 of a dense network, or of the keypoint detector of a sparse one.
        resolution: Size (H, W) that a dense network works at; None takes its authors'.
        upsample_resolution: Size (H, W) of its second pass.
        precision: "bfloat16" is several times faster where the processor has it (elsewhere many times slower, and
            there is a warning), and moves a few matches between places that look alike; None takes float32 for
            published networks, for l2m-tiny what is faster here.
        turns: Where little of B matches as it is, match it after each quarter turn, too, and take the best, see
            `Match.turns_B`: for pictures of which one may lie on its side, in up to four times the time.

    Raises:
        MissingError: there is no such matcher, or its weights are not here and cannot be fetched.
        FileFormatError: the weights are damaged, or another network's.
        L2MError: an option means nothing to this matcher.
    """
    _check_options(resolution, upsample_resolution, precision, turns)
    if name not in _MATCHERS:
        raise MissingError(f"no matcher named '{name}'", expected=f"one of {', '.join(_MATCHERS)}")
    entry = _MATCHERS[name]
    options = _Options(weights, backbone_weights, resolution, upsample_resolution, precision)
    for field in fields(options):
        if getattr(options, field.name) is not None and field.name not in entry.takes:
            expected = (
                f"of these options only {', '.join(entry.takes)}" if entry.takes else "none of these options"
            )
            raise L2MError(f"matcher '{name}'", expected=expected, got=field.name, todo="leave it out")
    device = resolve_device(device)
    if precision == "bfloat16" and fastest_precision(device) != "bfloat16":
        told = f"matcher '{name}': {device.type} does not multiply bfloat16 here, so float32 is many times faster"
        warnings.warn(told, stacklevel=2)
    matcher = entry.load(options, device)
    return TurnedMatcher(matcher) if turns else matcher


def _check_options(resolution: Any, upsample_resolution: Any, precision: Any, turns: Any) -> None:  # noqa: ANN401
    """What comes from a user's own code may be anything."""
    for option, hw in (("resolution", resolution), ("upsample_resolution", upsample_resolution)):
        whole = isinstance(hw, tuple | list) and len(hw) == 2 and all(type(side) is int for side in hw)
        if hw is not None and not (whole and all(0 < side <= _MAX_SIDE for side in hw)):
            expected = f"(H, W), two whole numbers from 1 to {_MAX_SIDE}"
            raise ShapeError(f"load_matcher {option}", expected=expected, got=repr(hw))
    if precision is not None and precision not in get_args(Precision):
        expected = " or ".join(f'"{known}"' for known in get_args(Precision))
        raise L2MError("load_matcher precision", expected=expected, got=repr(precision))
    if not isinstance(turns, bool):
        raise L2MError("load_matcher turns", expected="True or False", got=repr(turns))


_MAX_SIDE = 8192  # px; attention over such a picture needs more memory than there is


def _info(name: str, entry: _Entry) -> MatcherInfo:
    absent = [file for file in entry.files if file.find() is None]
    fetched = any(isinstance(file, Checkpoint) for file in absent)
    needs = ("fetched at first use: " if fetched else "") + "; ".join(file.where() for file in absent)
    return MatcherInfo(
        name, entry.kind, entry.summary, not absent, needs, tuple(file.file for file in absent)
    )
