"""What an evaluation found: the figures of every pair, their means over a benchmark, as a table and as a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from l2m_viz import __version__
from l2m_viz.data.files import write_text
from l2m_viz.errors import FileFormatError, L2MError
from l2m_viz.evaluation.pose import pose_auc

AUC_DEG = (5.0, 10.0, 20.0)
"""Thresholds of the area under the pose curve."""

_PACKAGES = ("torch", "numpy", "opencv-python-headless")  # they decide the figures
_DENSE = ("epe_px", "pck1", "pck3", "pck5", "pck10", "ap")


@dataclass(frozen=True)
class PairResult:
    """How one matcher did on one pair; None where the pair's truth does not say.

    Attributes:
        matcher: Its name.
        benchmark: The pair's.
        pair: Its name in the benchmark.
        seconds: Of matching, both directions, images in memory.
        overlap: The matcher's mean certainty.
        epe_px: Median end-point error over the covisible pixels.
        pck1: Share of them under 1 px.
        pck3: ... 3 px.
        pck5: ... 5 px.
        pck10: ... 10 px.
        ap: Average precision of the certainty, see `compare_with_truth`.
        pose_errors_deg: One a shuffle of the matches; empty without a pose.
    """

    matcher: str
    benchmark: str
    pair: str
    seconds: float
    overlap: float
    epe_px: float | None = None
    pck1: float | None = None
    pck3: float | None = None
    pck5: float | None = None
    pck10: float | None = None
    ap: float | None = None
    pose_errors_deg: tuple[float, ...] = ()


@dataclass(frozen=True)
class BenchmarkResult:
    """Means over the pairs of one benchmark; ``auc`` and ``auc_deviation`` belong to `AUC_DEG`, over the shuffles."""

    benchmark: str
    matcher: str
    num_pairs: int
    seconds: float
    overlap: float
    max_overlap: float
    epe_px: float | None
    pck1: float | None
    pck3: float | None
    pck5: float | None
    pck10: float | None
    ap: float | None
    auc: tuple[float, ...] = ()
    auc_deviation: tuple[float, ...] = ()


@dataclass(frozen=True)
class Report:
    """Results of one or more matchers under one protocol, with the versions that decide the figures."""

    results: tuple[PairResult, ...]
    protocol: dict[str, float]
    versions: dict[str, str]

    @classmethod
    def joined(cls, reports: Sequence["Report"]) -> "Report":
        """One report of several matchers.

        Raises:
            L2MError: there is none, or they differ in protocol or versions, so that the figures do not compare.
        """
        if not reports:
            raise L2MError("Report.joined", expected="at least one report", got="none")
        first = reports[0]
        for other in reports[1:]:
            if (other.protocol, other.versions) != (first.protocol, first.versions):
                got = f"{first.protocol} {first.versions} and {other.protocol} {other.versions}"
                raise L2MError("Report.joined", expected="one protocol and one set of versions", got=got)
        results = tuple(result for report in reports for result in report.results)
        return cls(results, first.protocol, first.versions)

    def benchmarks(self) -> list[BenchmarkResult]:
        """Means, benchmark by benchmark, within each the matchers, in the order of the results."""
        benchmarks = dict.fromkeys(result.benchmark for result in self.results)
        matchers = dict.fromkeys(result.matcher for result in self.results)
        groups = (
            [result for result in self.results if (result.benchmark, result.matcher) == (benchmark, matcher)]
            for benchmark in benchmarks
            for matcher in matchers
        )
        return [_mean_result(group) for group in groups if group]

    def to_markdown(self) -> str:
        """The table, and the protocol under it."""
        head = "| benchmark | matcher | pairs | epe px | pck1 | pck3 | pck5 | pck10 | AP | "
        head += "".join(f"AUC@{threshold:g} | " for threshold in AUC_DEG) + "overlap | s/pair |"
        rule = "|---|---|" + "--:|" * (head.count("|") - 3)
        rows = [_markdown_row(row) for row in self.benchmarks()]
        protocol = ", ".join(f"{name} {value:g}" for name, value in self.protocol.items())
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        return "\n".join([head, rule, *rows, "", _LEGEND, f"Protocol: {protocol}. Versions: {versions}.", ""])

    def save(self, path: str | Path) -> None:
        """Write the table (.md), or everything, to be loaded again (.json).

        Raises:
            FileFormatError: another suffix, or a folder that cannot be written to.
        """
        if report_format(path) == "md":
            write_text(path, self.to_markdown())
            return
        content = {"type": "Report", **asdict(self), "means": [asdict(row) for row in self.benchmarks()]}
        write_text(path, json.dumps(content, indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what `save` wrote as JSON; the means are made anew.

        Raises:
            FileFormatError: the file is absent, not JSON, or not a report.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["type"] != "Report":
                raise ValueError(f"a {content['type']}")
            results = tuple(_pair_result(row) for row in content["results"])
            protocol = {str(name): float(value) for name, value in content["protocol"].items()}
            versions = {str(name): str(value) for name, value in content["versions"].items()}
        except FileNotFoundError as error:
            raise FileFormatError(f"no such file {path}", todo="check the path") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            got = f"{type(error).__name__}: {str(error)[:200]}"
            raise FileFormatError(f"cannot read {path}", expected="a saved Report", got=got) from error
        return cls(results, protocol, versions)


def report_format(path: str | Path) -> Literal["md", "json"]:
    """What `Report.save` writes under this name; to be asked before hours of work.

    Raises:
        FileFormatError: another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".md", ".json"):
        raise FileFormatError(f"cannot write {path}", expected="a name in .json or .md", got=repr(suffix))
    return "md" if suffix == ".md" else "json"


def package_versions() -> dict[str, str]:
    """Versions of this package and of those whose numbers enter the figures."""
    return {"l2m-viz": __version__, **{package: metadata.version(package) for package in _PACKAGES}}


_LEGEND = (
    "Means over pairs. epe: median end-point error over covisible pixels; AP: of the certainty, for covisible and"
    " right; AUC: of the larger pose error, mean±deviation over shuffles of the matches; overlap: mean certainty, both"
    " directions (the highest of the pairs in brackets); s/pair: matching alone."
)


def _mean_result(results: list[PairResult]) -> BenchmarkResult:
    """Average one matcher's results on one benchmark."""
    first = results[0]
    overlaps = [result.overlap for result in results]
    auc, deviation = _auc_over_shuffles([result.pose_errors_deg for result in results])
    return BenchmarkResult(
        benchmark=first.benchmark,
        matcher=first.matcher,
        num_pairs=len(results),
        seconds=sum(result.seconds for result in results) / len(results),
        overlap=sum(overlaps) / len(overlaps),
        max_overlap=max(overlaps),
        auc=auc,
        auc_deviation=deviation,
        **{name: _mean([getattr(result, name) for result in results]) for name in _DENSE},
    )


def _mean(values: list[float | None]) -> float | None:
    """The mean of what was measured."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def _auc_over_shuffles(errors_deg: list[tuple[float, ...]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation over the shuffles of the area that each one's errors over the pairs have."""
    with_pose = [errors for errors in errors_deg if errors]
    if not with_pose:
        return (), ()
    areas = torch.tensor([pose_auc(torch.tensor(errors), AUC_DEG) for errors in zip(*with_pose, strict=True)])
    return tuple(areas.mean(dim=0).tolist()), tuple(areas.std(dim=0, correction=0).tolist())


def _markdown_row(row: BenchmarkResult) -> str:
    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    areas = [f"{a:.3f}±{d:.3f}" for a, d in zip(row.auc, row.auc_deviation, strict=True)]
    overlap = f"{row.overlap:.3f}" + (f" ({row.max_overlap:.3f})" if row.num_pairs > 1 else "")
    cells = [
        row.benchmark, row.matcher, str(row.num_pairs), number(row.epe_px, 2),
        *(number(getattr(row, name), 3) for name in _DENSE[1:]),
        *(areas or ["–"] * len(AUC_DEG)), overlap, f"{row.seconds:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _pair_result(row: dict[str, Any]) -> PairResult:
    """Build a result from JSON: text must be text and numbers numbers, whoever wrote the file."""
    values = dict(row)
    if unknown := values.keys() - {field.name for field in fields(PairResult)}:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    errors = tuple(float(error) for error in values.pop("pose_errors_deg", ()))
    names = {name: str(values.pop(name)) for name in ("matcher", "benchmark", "pair")}
    numbers = {name: None if value is None else float(value) for name, value in values.items()}
    return PairResult(**names, **numbers, pose_errors_deg=errors)  # pyright: ignore[reportArgumentType]
