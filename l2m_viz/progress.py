"""A bar on the terminal for long work; logs and pipes, where a bar is a thousand lines, get none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

Progress = Callable[[float, str], None]
"""Called with the share of the work done, 0 to 1, and what is being done next."""


@contextmanager
def percent_bar() -> Iterator[Progress]:
    """A bar that takes the share of the work done, 0 to 1, and what is being done next."""
    with tqdm(total=100, bar_format="{desc:44} {bar} {n:3.0f} % [{elapsed}]", disable=None) as bar:

        def progress(share: float, what: str) -> None:
            bar.set_description_str(what)
            bar.update(100 * share - bar.n)

        yield progress
