"""Public checkpoints: fetched from a server, resumed, verified, converted once; other projects' files by format."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steadyflow.checkpoints.download import download, verify

DATA = bytes(range(256)) * 5000  # 1.28 MB: more than one chunk


class Server(ThreadingHTTPServer):
    """Serves `data` with ranges; `breaks` cuts the next answers off after so many bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag, self.breaks = DATA, '"1"', [0]
        self.breaks.clear()
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        if "none" in self.path:
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0  # type: ignore[index]
        start = start if self.headers["If-Range"] in (None, self.server.etag) else 0
        if start >= len(self.server.data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        body = self.server.data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        self.wfile.write(body[: self.server.breaks.pop() if self.server.breaks else None])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    it = Server()
    thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield it
    it.shutdown()
    thread.join()
    it.server_close()


def test_a_broken_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    file, seen = tmp_path / "a" / "weights.pt", []
    server.breaks = [1_100_000]
    with pytest.raises(ValueError, match=r"truncated download of .*: 1100000 of 1280000 bytes are here; .* goes on"):
        download(server.url, file)
    assert not file.exists()
    download(server.url, file, lambda have, total: seen.append((have, total)))
    assert file.read_bytes() == DATA
    assert server.ranges == [None, "bytes=1100000-"]
    assert seen[-1] == (1280000, 1280000)
    assert [p.name for p in file.parent.iterdir()] == ["weights.pt"]


def test_another_version_on_the_server_is_begun_anew(server: Server, tmp_path: Path) -> None:
    server.breaks = [500_000]
    with pytest.raises(ValueError, match="truncated download"):
        download(server.url, tmp_path / "it")
    server.data, server.etag = DATA[::-1], '"2"'
    download(server.url, tmp_path / "it")
    assert (tmp_path / "it").read_bytes() == DATA[::-1]


def test_without_a_connection_the_file_to_put_is_named(server: Server, tmp_path: Path) -> None:
    for url, said in ((server.url + "/none", "answers 404"), ("http://127.0.0.1:9/weights.pt", "cannot reach")):
        with pytest.raises(FileNotFoundError, match=rf"{said}.* put {url} at {tmp_path}/it"):
            download(url, tmp_path / "it")


def test_a_hash_is_published_or_recorded_and_checked_ever_after(tmp_path: Path) -> None:
    file, sha256 = tmp_path / "it", hashlib.sha256(DATA).hexdigest()
    file.write_bytes(DATA)
    with pytest.raises(ValueError, match=rf"its config says sha256 {'0' * 64}, found {sha256}; delete it"):
        verify(file, "0" * 64)
    with pytest.raises(ValueError, match="its config says md5 00, found"):
        verify(file, None, "00")
    assert verify(file, sha256.upper(), hashlib.md5(DATA).hexdigest()) == verify(file, None) == sha256
    assert (tmp_path / "it.sha256").read_text() == f"{sha256}  it\n"
    file.write_bytes(DATA[:-1])
    with pytest.raises(ValueError, match=rf"it.sha256, of its first use, says sha256 {sha256}, found"):
        verify(file, None)
