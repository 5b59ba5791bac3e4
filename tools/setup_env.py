"""Create .venv and fill it, once. `make env` runs this with the system's Python; only the standard library is used.

The order matters: PyTorch first, because what comes after it depends on it and would otherwise choose the build. Where
there is no NVIDIA GPU, PyTorch's own index of CPU wheels is added for that one step if it answers, which saves
gigabytes; if not, the configured registry gives what it has. A stamp written at the very end makes the next run a
comparison of two strings. A run that was killed leaves no stamp, and the next one repairs what it left.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the one file that an older Python reads: it must say so
    sys.exit(
        "setup: Python 3.11 or newer is needed, {} is {}.{}. Name another: make PYTHON=/path/to/python3.11".format(
            sys.executable, *sys.version_info[:2]
        )
    )

import argparse
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "l2m-environment.json"
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = "app,notebooks,dev,gpu,models,training,reconstruction"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 5.0

LOCK_HEADER = """\
# Exact versions of the whole environment, for `pip install -c`. Written by `make lock` from a finished .venv; to move a
# package, `.venv/bin/pip install -U name`, then `make lock`. Made and tested with Python {version} on Linux; other
# versions of Python install from the same lines but were not tested by hand, and packages that only they or CUDA
# builds of PyTorch need (nvidia-*, triton, ...) are not listed.
"""
LOCK_SKIP = re.compile(r"(pip|wheel|triton|nvidia-.*|cuda-.*)==", re.IGNORECASE)


def main() -> None:
    """Bring .venv up to date, or with --lock write its versions to constraints.txt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch", required=True, metavar="VERSION", help="the exact PyTorch release to install"
    )
    parser.add_argument("--lock", action="store_true", help="write constraints.txt from .venv instead")
    args = parser.parse_args()
    if args.lock:
        lock()
        return
    wanted = stamp(args.torch)
    if PYTHON.exists() and read_stamp() == wanted:
        return
    make_venv()
    remove_half_installed()
    install_torch(args.torch)
    pip("install", "--constraint", str(CONSTRAINTS), "--editable", f".[{EXTRAS}]", what="the project")
    print(f"setup: {torch_build()}", flush=True)
    STAMP.write_text(json.dumps(wanted))


def stamp(torch: str) -> dict[str, str]:
    """Everything that decides what .venv holds. The folder is part of it: a moved virtual environment is broken."""
    inputs = (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes() + Path(__file__).read_bytes()
    return {"inputs": hashlib.sha256(inputs).hexdigest(), "torch": torch, "folder": str(ROOT)}


def read_stamp() -> dict[str, str]:
    """What the last finished run wrote; empty when there was none."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def make_venv() -> None:
    """Create .venv; start over when it is another folder's, too old, or was killed before pip was in it."""
    moved = read_stamp().get("folder", str(ROOT)) != str(ROOT)
    check = "import pip, sys; sys.exit(sys.version_info < (3, 11))"
    if not moved and PYTHON.exists() and run("-c", check).returncode == 0:
        STAMP.unlink(missing_ok=True)  # from here on, a kill leaves an environment that the next run repairs
        return
    try:
        import ensurepip  # noqa: F401 - Debian has `venv` without it, and fails later in many lines
        import venv  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"setup: {sys.executable} cannot make virtual environments ({error}). "
            "On Debian and Ubuntu: apt-get install python3-venv"
        )
    print(f"setup: creating {VENV} with Python {sys.version.split()[0]}", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False).returncode:
        sys.exit(f"setup: `{sys.executable} -m venv` failed; the lines above say why")


def remove_half_installed() -> None:
    """Forget packages that a killed pip left behind, so that pip installs them again instead of trusting them.

    pip writes RECORD last; ``~name`` is what it was replacing.
    """
    for site_packages in VENV.glob("lib/python*/site-packages"):
        for metadata in site_packages.glob("*.dist-info"):
            if not (metadata / "RECORD").exists():
                print(f"setup: {metadata.name} is half installed; installing it again", flush=True)
                shutil.rmtree(metadata)
        for leftover in site_packages.glob("~*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def install_torch(version: str) -> None:
    """Install PyTorch alone, from the index of CPU wheels as well when that is useful and reachable."""
    options: list[str] = []
    if sys.platform == "darwin":
        print("setup: macOS, PyTorch comes from the configured registry", flush=True)
    elif has_nvidia_gpu():
        print("setup: NVIDIA GPU found, PyTorch comes from the configured registry", flush=True)
    elif reachable(f"{CPU_INDEX}/torch/"):
        print(f"setup: no NVIDIA GPU, adding {CPU_INDEX} for PyTorch", flush=True)
        options = ["--extra-index-url", CPU_INDEX]  # not --index-url, which would hide the registry
    else:
        print(f"setup: no NVIDIA GPU, no answer from {CPU_INDEX}: PyTorch from the registry", flush=True)
    pip("install", "--constraint", str(CONSTRAINTS), *options, f"torch=={version}", what=f"torch {version}")


def has_nvidia_gpu() -> bool:
    """Say whether a driver lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def reachable(url: str) -> bool:
    """Say whether ``url`` answers within `PROBE_SECONDS`.

    The request runs in a thread that nobody waits for longer: urllib's timeout does not cover name resolution.
    """
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as response:
                answers.append(response.status == 200)
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]


def pip(*arguments: str, what: str) -> None:
    """Run .venv's pip, and stop with one readable line if it fails."""
    print(f"setup: installing {what}", flush=True)
    command = [str(PYTHON), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, cwd=ROOT, env=clean_environment(), check=False).returncode:
        sys.exit(
            f"setup: pip could not install {what}; its lines above say why. `make env` goes on from here"
        )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run .venv's Python and return what it said."""
    command = [str(PYTHON), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)


def output(*arguments: str) -> str:
    """Return what .venv's Python prints, or stop with the end of its error."""
    result = run(*arguments)
    if result.returncode:
        sys.exit(
            f"setup: .venv is broken, `python {' '.join(arguments)}` said: {result.stderr.strip()[-300:]}"
        )
    return result.stdout.strip()


def clean_environment() -> dict[str, str]:
    """The environment without what would make pip look or install outside .venv."""
    outside = {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"}
    return {name: value for name, value in os.environ.items() if name not in outside}


def torch_build() -> str:
    """Say which PyTorch came: its version, and whether it can use CUDA."""
    version, _, cuda = output(
        "-c", "import torch; print(torch.__version__, torch.version.cuda or '')"
    ).partition(" ")
    return f"torch {version}, a build for {f'CUDA {cuda}' if cuda else 'the CPU'}"


def lock() -> None:
    """Write constraints.txt from what .venv holds, without local suffixes such as ``+cpu``."""
    frozen = output("-m", "pip", "freeze", "--all", "--exclude-editable").splitlines()
    pins = [re.sub(r"\+.*", "", line) for line in frozen if "==" in line and not LOCK_SKIP.match(line)]
    version = output("-c", "import sys; print('{}.{}'.format(*sys.version_info))")
    CONSTRAINTS.write_text(LOCK_HEADER.format(version=version) + "".join(f"{pin}\n" for pin in pins))
    print(f"setup: {CONSTRAINTS.name} has {len(pins)} packages; the next make compares .venv with it")


if __name__ == "__main__":
    main()
