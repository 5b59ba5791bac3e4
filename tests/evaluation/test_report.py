"""Means by hand, the table, and files that come back or are refused."""

import json
import math
from dataclasses import replace

import pytest

from l2m_viz.errors import FileFormatError, L2MError
from l2m_viz.evaluation import PairResult, Report, report_format

FIRST = PairResult(
    "dis", "rooms", "1-2", seconds=0.2, overlap=0.3, epe_px=2.0, pck1=0.1, pck3=0.2, pck5=0.3, pck10=0.4,
    ap=0.5, pose_errors_deg=(0.0, 180.0, 0.0),
)  # fmt: skip
SECOND = replace(
    FIRST, pair="2-3", seconds=0.4, overlap=0.5, epe_px=4.0, pck1=0.3, ap=1.0, pose_errors_deg=(180.0, 180.0, 0.0)
)  # fmt: skip
NOTHING = PairResult("dis", "unrelated", "a-b", seconds=0.1, overlap=0.01)
PROTOCOL, VERSIONS = {"num_shuffles": 3.0}, {"torch": "2.13"}


@pytest.fixture
def report():
    return Report((FIRST, SECOND, NOTHING), PROTOCOL, VERSIONS)


def test_means_over_the_pairs(report):
    rooms, unrelated = report.benchmarks()
    assert (rooms.benchmark, rooms.matcher, rooms.num_pairs) == ("rooms", "dis", 2)
    figures = (rooms.epe_px, rooms.pck1, rooms.ap, rooms.overlap, rooms.max_overlap, rooms.seconds)
    assert figures == pytest.approx((3.0, 0.2, 0.75, 0.4, 0.5, 0.3))
    assert (unrelated.num_pairs, unrelated.epe_px, unrelated.ap, unrelated.auc) == (1, None, None, ())


def test_pose_areas_are_taken_over_the_pairs_and_averaged_over_the_shuffles(report):
    # shuffle by shuffle the two pairs have (0, 180), (180, 180), (0, 0): areas 1/2, 0, 1 at any threshold
    rooms = report.benchmarks()[0]
    assert rooms.auc == pytest.approx([0.5] * 3)
    assert rooms.auc_deviation == pytest.approx([math.sqrt((0 + 0.25 + 0.25) / 3)] * 3)


def test_the_table_has_a_line_for_each_benchmark_and_matcher(report):
    sift = replace(FIRST, matcher="sift", epe_px=1.5)
    text = Report.joined([report, Report((sift,), PROTOCOL, VERSIONS)]).to_markdown()
    head, rule, *lines = [line for line in text.splitlines() if line.startswith("|")]
    starts = [line.split(" | ")[:4] for line in lines]
    assert starts == [
        ["| rooms", "dis", "2", "3.00"],
        ["| rooms", "sift", "1", "1.50"],
        ["| unrelated", "dis", "1", "–"],
    ]
    assert {line.count("|") for line in (head, rule, *lines)} == {15}
    assert "0.500±0.408" in lines[0]
    assert "0.400 (0.500)" in lines[0]
    assert "num_shuffles 3" in text


def test_reports_of_unlike_protocols_are_not_joined(report):
    other = replace(report, protocol={"num_shuffles": 5.0})
    with pytest.raises(L2MError, match="one protocol"):
        Report.joined([report, other])
    with pytest.raises(L2MError, match="at least one report"):
        Report.joined([])


def test_json_comes_back_and_holds_the_means(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["means"][0]["epe_px"] == 3.0


def test_markdown_is_the_table(report, tmp_path):
    report.save(tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == report.to_markdown()


def test_other_names_are_refused_before_the_work(report, tmp_path):
    with pytest.raises(FileFormatError, match=r"in \.json or \.md"):
        report_format("report.csv")
    with pytest.raises(FileFormatError, match=r"in \.json or \.md"):
        report.save(tmp_path / "report")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(type="Other"),
        lambda content: content.pop("results"),
        lambda content: content["results"][0].update(epe_px="two"),
        lambda content: content["results"][0].update(rank=1),
        lambda content: content["results"][0].pop("overlap"),
        lambda content: content["results"][0].update(overlap=None),
        lambda content: content.update(protocol=[1, 2]),
    ],
)
def test_a_foreign_file_is_refused(report, tmp_path, change):
    path = tmp_path / "report.json"
    report.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match="a saved Report"):
        Report.load(path)


def test_an_absent_or_truncated_file_is_refused(report, tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        Report.load(tmp_path / "absent.json")
    path = tmp_path / "report.json"
    report.save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileFormatError, match="cannot read"):
        Report.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(FileFormatError, match="cannot read"):
        Report.load(path)
