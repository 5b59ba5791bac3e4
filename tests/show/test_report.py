"""The report is one page that needs nothing else, and shows text as text."""

import re

from l2m_viz.show.report import Number, Picture, Section, write_report


def test_the_page_is_self_contained_and_escaped(tmp_path):
    section = Section(
        "A <b>", "x & y", [Number("n", 12345, "px", "a"), Number("m", 0.123456)], [Picture(b"123", "<i>")]
    )
    write_report(tmp_path / "deep" / "r.html", "T <script>", [section], {"k": "<v>"})
    text = (tmp_path / "deep" / "r.html").read_text()
    assert "<script>" not in text
    assert "<b>" not in text
    assert "12,345" in text
    assert "0.1235" in text
    assert "data:image/png;base64,MTIz" in text
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    assert "torch version" in text
