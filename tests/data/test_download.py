"""Downloads from a server of the test's own that breaks off, refuses, changes its file, and answers in odd ways."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from l2m_viz.data import download as module
from l2m_viz.data.download import check_hash, download, file_sha256
from l2m_viz.errors import FileFormatError, MissingError

DATA = bytes(range(256)) * 9000  # 2.3 MB: three chunks
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``data`` with byte ranges; ``cuts`` says after how many bytes each next answer breaks off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag, self.ranges, self.status = DATA, '"one"', True, 200
        self.cuts: list[int] = []
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        current = self.headers.get("If-Range") in {None, server.etag}
        if server.ranges and wanted and current and first >= len(server.data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        partial = server.ranges and bool(wanted) and current
        body = server.data[first:] if partial else server.data
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{len(server.data) - 1}/{len(server.data)}")
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, format, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(module, "_PAUSES_S", (0.0, 0.0))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder):
    return {path.name for path in folder.iterdir()} - {"weights.pth.lock"}


def test_a_file_arrives_whole_with_its_hash_beside_it(server, tmp_path):
    shares = []
    download(server.url, tmp_path / "new" / "weights.pth", progress=lambda share, what: shares.append(share))
    assert (tmp_path / "new" / "weights.pth").read_bytes() == DATA
    assert (tmp_path / "new" / "weights.pth.sha256").read_text() == f"{SHA256}  weights.pth\n"
    assert names(tmp_path / "new") == {"weights.pth", "weights.pth.sha256"}
    assert shares == sorted(shares)
    assert shares[-1] == 1
    download(server.url, tmp_path / "new" / "weights.pth")
    assert len(server.asked) == 1  # it is there: nobody is asked


def test_a_broken_transfer_goes_on_where_it_was(server, tmp_path):
    server.cuts = [1_000_000, 500_000]
    download(server.url, tmp_path / "weights.pth", SHA256)
    assert (tmp_path / "weights.pth").read_bytes() == DATA
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_later_process_goes_on_too(server, tmp_path):
    server.cuts = [700_000, 0, 0]
    with pytest.raises(MissingError, match="700000 bytes are kept") as caught:
        download(server.url, tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in str(caught.value)
    assert server.url in str(caught.value)
    assert not (tmp_path / "weights.pth").exists()
    server.asked.clear()
    download(server.url, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == DATA
    assert server.asked == ["bytes=700000-"]


def test_whoever_stops_it_can_go_on(server, tmp_path):
    def stop(share, what):
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url, tmp_path / "weights.pth", progress=stop)
    kept = (tmp_path / "weights.pth.part").stat().st_size
    assert 0 < kept < len(DATA)
    server.asked.clear()
    download(server.url, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == DATA
    assert server.asked == [f"bytes={kept}-"]


def test_halves_of_two_versions_are_not_glued_together(server, tmp_path):
    server.cuts = [1_000_000, 0, 0]
    with pytest.raises(MissingError):
        download(server.url, tmp_path / "weights.pth")
    server.data, server.etag = DATA[::-1], '"two"'
    download(server.url, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == DATA[::-1]


def test_without_a_mark_of_the_version_it_starts_again(server, tmp_path):
    server.etag = ""
    server.cuts = [1_000_000]
    download(server.url, tmp_path / "weights.pth")
    assert server.asked == [None, None]
    assert (tmp_path / "weights.pth").read_bytes() == DATA


def test_a_known_hash_is_mark_enough(server, tmp_path):
    server.etag = ""
    server.cuts = [1_000_000]
    download(server.url, tmp_path / "weights.pth", SHA256)
    assert server.asked == [None, "bytes=1000000-"]
    assert (tmp_path / "weights.pth").read_bytes() == DATA


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges = False
    server.cuts = [1_000_000]
    download(server.url, tmp_path / "weights.pth", SHA256)
    assert (tmp_path / "weights.pth").read_bytes() == DATA


@pytest.mark.parametrize(("kept", "expected_requests"), [(len(DATA), 1), (len(DATA) + 7, 2)])
def test_a_complete_part_is_only_checked_and_a_longer_one_thrown_away(
    server, tmp_path, kept, expected_requests
):
    (tmp_path / "weights.pth.part").write_bytes((DATA + b"garbage")[:kept])
    download(server.url, tmp_path / "weights.pth", SHA256)
    assert (tmp_path / "weights.pth").read_bytes() == DATA
    assert len(server.asked) == expected_requests


def test_a_wrong_hash_leaves_nothing_behind(server, tmp_path):
    wrong = "0" * 64
    with pytest.raises(FileFormatError, match=f"expected sha256 {wrong}, got sha256 {SHA256}"):
        download(server.url, tmp_path / "weights.pth", wrong)
    assert not {"weights.pth", "weights.pth.part", "weights.pth.sha256"} & names(tmp_path)
    download(
        server.url, tmp_path / "weights.pth", SHA256[:8]
    )  # the first digits are enough, if that is all there is
    assert (tmp_path / "weights.pth").is_file()


def test_a_refusal_is_final_and_a_busy_server_is_not(server, tmp_path):
    server.status = 404
    with pytest.raises(MissingError, match="404"):
        download(server.url, tmp_path / "weights.pth")
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(MissingError, match="503"):
        download(server.url, tmp_path / "weights.pth")
    assert len(server.asked) == 1 + 3


def test_no_connection_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(module, "_PAUSES_S", (60.0,))  # would be noticed
    with pytest.raises(MissingError, match=r"could not be fetched.*Fetch http://127\.0\.0\.1:9/w\.pth"):
        download("http://127.0.0.1:9/w.pth", tmp_path / "w.pth")


def test_who_wants_no_connections_gets_none(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE is set"):
        download(server.url, tmp_path / "weights.pth")
    assert server.asked == []


def test_a_place_that_cannot_be_written_is_said(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileFormatError, match="cannot write"):
        download(server.url, tmp_path / "file" / "weights.pth")


def test_two_at_once_fetch_it_once(server, tmp_path):
    threads = [
        threading.Thread(target=download, args=(server.url, tmp_path / "weights.pth", SHA256))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 1
    assert (tmp_path / "weights.pth").read_bytes() == DATA


def test_what_was_noted_at_the_download_holds_ever_after(server, tmp_path):
    path = tmp_path / "weights.pth"
    download(server.url, path)
    check_hash(path)
    assert file_sha256(path) == SHA256
    with path.open("r+b") as file:
        file.write(b"X")
    with pytest.raises(FileFormatError, match=SHA256):
        check_hash(path)
    (tmp_path / "own.pth").write_bytes(b"no note")
    check_hash(tmp_path / "own.pth")  # nobody knows better
