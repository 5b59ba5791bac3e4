"""Take the pictures of the README with a real browser: `make screenshots` writes docs/images/app.png and viewer.png."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Software WebGL, and no calls home.
_ARGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]


@contextmanager
def served(module: str) -> Iterator[str]:
    """Run `python -m MODULE` on a free port until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", module, "--port", str(port)], cwd=ROOT)
    try:
        for _ in range(300):
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}", timeout=5):
                break
            if process.poll() is not None:
                sys.exit(f"screenshots: {module} ended with exit code {process.returncode}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def take_app(page: Page, url: str) -> None:
    """The pair tab after matching the embedded stereo pair."""
    page.goto(url)
    page.get_by_text("stereo pair, measured truth").first.click()
    page.wait_for_timeout(3000)
    page.get_by_role("button", name="Match", exact=True).click()
    page.get_by_text("end-point").first.wait_for(timeout=120_000)
    page.wait_for_timeout(3000)
    page.screenshot(path=IMAGES / "app.png", full_page=True)


def take_viewer(page: Page, url: str) -> None:
    """The lifted Gaussians from the side, and what a click on them shows."""
    page.goto(url)
    page.get_by_text("Gaussians").first.wait_for(timeout=120_000)
    page.wait_for_timeout(8000)
    # the remark on software WebGL, which may also go by itself
    page.evaluate("document.querySelectorAll('.mantine-Notification-closeButton').forEach(x => x.click())")
    page.mouse.move(450, 450)
    page.mouse.down()
    for step in range(1, 6):  # slowly: the camera follows the mouse from one drawn picture to the next
        page.mouse.move(450 - 10 * step, 450 + 2.4 * step)
        page.wait_for_timeout(1000)
    page.mouse.up()
    for _ in range(5):  # back, until both cameras are in the picture
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(3000)
    page.wait_for_timeout(5000)
    page.mouse.click(465, 487)  # the tank
    page.wait_for_timeout(12000)
    page.screenshot(path=IMAGES / "viewer.png", timeout=180_000)  # software WebGL is slow


def main() -> None:
    """Take both pictures."""
    browser_path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser_path is None:
        sys.exit(
            f"screenshots: no browser found ({', '.join(_BROWSERS)}); on Debian: apt-get install chromium"
        )
    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=_ARGS)
        # all of the viewer's panel in one picture; the app's page is as long as it is
        for module, take, height in (("app", take_app, 860), ("app.viewer", take_viewer, 1020)):
            with served(module) as url:
                page = browser.new_page(viewport={"width": 1280, "height": height})
                take(page, url)
                page.close()
        browser.close()
    print(f"pictures in {IMAGES}")


if __name__ == "__main__":
    main()
