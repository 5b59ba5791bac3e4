"""The bar of long work: on a terminal, and nowhere else."""

import io
import sys

from l2m_viz.progress import percent_bar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _work() -> None:
    with percent_bar() as progress:
        progress(0.25, "lift")
        progress(1.0, "match")


def test_a_terminal_shows_what_is_being_done(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    _work()
    assert "match" in terminal.getvalue()
    assert "100 %" in terminal.getvalue()


def test_a_log_is_not_filled_with_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    _work()
    assert not log.getvalue()
