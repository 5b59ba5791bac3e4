"""Large files from the web: resumed where they broke off, checked by hash, whole or absent."""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from ssl import SSLError

from filelock import FileLock

from l2m_viz.data.files import remove_file, write_text
from l2m_viz.errors import FileFormatError, MissingError
from l2m_viz.progress import Progress

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"  # the hub's own switch; who sets it wants no connections at all

_CHUNK = 1 << 20
_DIGITS = 64  # of a whole SHA-256
_TIMEOUT_S = 30.0  # of each read, not of the whole file
_PAUSES_S = (1.0, 3.0, 9.0)  # between attempts; a transfer that got on starts over with the first
_LATER = {408, 425, 429, 500, 502, 503, 504}  # answers that may be another one in a moment


def download(url: str, path: str | Path, sha256: str = "", progress: Progress | None = None) -> None:
    """Fetch ``url`` to ``path``; a transfer that broke off, in this process or an earlier one, goes on where it was.

    The bytes collect in ``<path>.part``, which becomes ``path`` when all are there and their hash is right. The hash
    is written to ``<path>.sha256``, for `check_hash` to compare ever after.

    Args:
        url: http or https.
        path: Where the file is wanted; if it is already there, nothing is done.
        sha256: Hexadecimal digest that the file must have, or its first digits; empty if nobody published one.
        progress: Told the share done, for each MiB.

    Raises:
        MissingError: there is no connection, or the server refuses; says where to put the file by hand.
        FileFormatError: what came has another hash, or the folder cannot be written to.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):  # a second process waits and finds the file
            if path.is_file():
                return
            _require_online(url, path)
            _fetch(url, path, part, sha256, progress)
            digest = file_sha256(part)
            if not digest.startswith(sha256):
                part.unlink()
                got, todo = (
                    f"sha256 {digest}",
                    "try again; if it stays so, the file was replaced at its source",
                )
                raise FileFormatError(f"download of {url}", expected=f"sha256 {sha256}", got=got, todo=todo)
            write_text(
                _hash_path(path), f"{digest}  {path.name}\n"
            )  # before the file, which is never without it
            part.replace(path)
            remove_file(_tag_path(part))


def check_hash(path: str | Path, sha256: str = "") -> None:
    """Compare a file with ``sha256`` or, without one, with what `download` noted; no note, no opinion.

    Raises:
        FileFormatError: the file has another hash.
    """
    path = Path(path)
    note = _hash_path(path)
    expected = sha256 or (note.read_text().split()[0] if note.is_file() else "")
    if expected and not (digest := file_sha256(path)).startswith(expected):
        todo = "the file is damaged or was replaced; remove it, and it is fetched again"
        raise FileFormatError(f"{path}", expected=f"sha256 {expected}", got=digest, todo=todo)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        todo = "choose a folder that you can write to, with space left"
        raise FileFormatError(f"cannot write {path}", got=error.strerror or str(error), todo=todo) from error


def _require_online(url: str, path: Path) -> None:
    if os.environ.get(OFFLINE_VARIABLE, "0").lower() not in {"", "0", "false", "no", "off"}:
        raise _absent(url, path, f"{OFFLINE_VARIABLE} is set")


def _absent(url: str, path: Path, why: str) -> MissingError:
    todo = f"fetch {url} with a connection and put it at {path}"
    return MissingError(f"{path.name} is not on this machine and could not be fetched", got=why, todo=todo)


def _fetch(url: str, path: Path, part: Path, sha256: str, progress: Progress | None) -> None:
    """Transfer until all bytes are there; whoever does not answer at all is not asked twice."""
    pauses, begun = list(_PAUSES_S), False
    while True:
        before = _size(part)
        try:
            _transfer(url, part, sha256, progress)
            return
        except urllib.error.HTTPError as error:
            error.close()
            reason: Exception = error
            worth_waiting = error.code in _LATER
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
            SSLError,
        ) as error:
            reason = error
            begun = begun or _size(part) > before
            worth_waiting = begun
        if _size(part) > before:
            pauses = list(_PAUSES_S)
        if not pauses or not worth_waiting:
            kept = f"; {_size(part)} bytes are kept for the next attempt" if _size(part) else ""
            raise _absent(url, path, f"{reason}{kept}") from reason
        time.sleep(pauses.pop(0))


def _transfer(url: str, part: Path, sha256: str, progress: Progress | None) -> None:
    """Bring ``part`` from where it is to its end, or from the start if the file may be another one by now."""
    tag = _tag_path(part)
    validator = tag.read_text() if tag.is_file() else ""
    # Without a mark of the version, only the hash at the end could tell two halves of different files apart.
    start = _size(part) if validator or len(sha256) == _DIGITS else 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "l2m-viz"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": validator} if validator else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        error.close()
        if _total(error.headers) == start:
            return  # all of it came, and then the process ended
        part.unlink()
        _transfer(url, part, sha256, progress)
        return
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the whole file again
        elif (first := _first_byte(response)) != start:
            raise http.client.HTTPException(f"asked for byte {start} on, got byte {first} on")
        total = _total(response.headers)
        write_text(tag, _validator(response.headers))
        _append(response, part, start, total, progress)
    if total is not None and _size(part) != total:
        raise ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")


def _append(
    response: http.client.HTTPResponse, part: Path, start: int, total: int | None, progress: Progress | None
) -> None:
    name = part.name.removesuffix(".part")
    with part.open("ab" if start else "wb") as file:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            start += len(chunk)
            if progress is not None:
                progress(start / total if total else 0.0, f"{name}: {start / 1e6:.0f} MB")
        file.flush()
        os.fsync(file.fileno())


def _first_byte(response: http.client.HTTPResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _total(headers: Message) -> int | None:
    """Size of the whole file, as far as the answer tells."""
    found = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    size = found[1] if found else headers.get("Content-Length")
    return int(size) if size is not None else None


def _validator(headers: Message) -> str:
    """What names this version of the file: a strong ETag, or the date of its last change."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _hash_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _tag_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")
