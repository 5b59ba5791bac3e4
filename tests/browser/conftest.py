"""A real Chromium for the tests that do what a user does. Debian's package, driven by Playwright; no download."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Without these, Chromium calls home at every start, and in a closed network waits for the answers.
_ARGS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip


# Software WebGL draws each frame on the processor: a page gets ten a second, and the servers get the rest.
_FEW_FRAMES = """{
    const draw = window.requestAnimationFrame.bind(window), waiting = new Map();
    let last = 0;
    window.requestAnimationFrame = callback => {
        const id = ++last;
        const now = time => waiting.delete(id) && callback(time);
        waiting.set(id, setTimeout(() => draw(now), 100));
        return id;
    };
    window.cancelAnimationFrame = id => {
        clearTimeout(waiting.get(id));
        waiting.delete(id);
    };
}"""


@pytest.fixture(scope="session")
def browser():
    """One headless Chromium for all browser tests."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium found ({', '.join(_NAMES)}); on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=_ARGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A fresh page of 1280x900 px; a JavaScript error on it fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(_FEW_FRAMES)
    context.set_default_timeout(150_000)  # a click waits for frames, which others may keep from coming
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors, errors


@pytest.fixture
def serve() -> Iterator[Callable[[str], str]]:
    """Start `python -m MODULE --port N` from the project's root and return its address when it answers."""
    yield from _servers()


@pytest.fixture(scope="module")
def serve_once() -> Iterator[Callable[[str], str]]:
    """As `serve`, for servers that all tests of a file share."""
    yield from _servers()


def _servers() -> Iterator[Callable[[str], str]]:
    running: list[subprocess.Popen] = []

    def start(module: str, *args: str) -> str:
        port = _free_port()
        command = [sys.executable, "-m", module, "--port", str(port), *args]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        running.append(process)
        _wait_for(port, process)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the server ended with exit code {process.returncode} before it answered")
        with _closing_connection(port) as answered:
            if answered:
                return
        time.sleep(0.2)
    pytest.fail(f"no answer on port {port} after {seconds} s")


@contextmanager
def _closing_connection(port: int) -> Iterator[bool]:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            yield True
    except OSError:
        yield False
