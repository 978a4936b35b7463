"""Downloads from a local server that breaks off, changes its mind and lies."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from inference.model import download, weights
from inference.model.weights import read_weights, record_sha256

NAME = "sam_med3d_turbo"
FILE = f"{NAME}.pth"


class Server(ThreadingHTTPServer):
    """Serves ``content``; what else it does is set by its attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        saved = io.BytesIO()
        torch.save({"model_state_dict": {"weight": torch.randn(1_000_000)}}, saved)
        self.content = saved.getvalue()
        self.etag: str | None = '"one"'
        self.break_after: list[int] = []  # bytes of the next answers' bodies, then the rest
        self.statuses: list[int] = []  # of the next answers
        self.ranges = self.lengths = True
        self.content_type = "application/octet-stream"
        self.requests: list[str | None] = []  # the Range of each

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/main"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if self.path != f"/main/{FILE}":
            self.send_error(404)
            return
        body, total = server.content, len(server.content)
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start < total else 416)
            span = f"{start}-{total - 1}" if start < total else "*"
            self.send_header("Content-Range", f"bytes {span}/{total}")
            body = body[start:]
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Type", server.content_type)
        if server.lengths:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.break_after.pop(0)] if server.break_after else body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check(server: Server, folder: Path) -> None:
    """All of the file is there, recorded, and nothing else is."""
    assert (folder / FILE).read_bytes() == server.content
    assert names(folder) == {FILE, "SHA256SUMS"}
    assert (folder / "SHA256SUMS").read_text(encoding="utf-8") == f"{server.sha256}  {FILE}\n"


def test_fetch_records_then_verifies(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    path = download.fetch(NAME, folder, server.url)
    check(server, folder)
    assert read_weights(path)[0]["weight"].shape == (1_000_000,)
    assert download.fetch(NAME, folder, server.url) == path
    assert server.requests == [None]  # the second time nothing was asked for
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="damaged"):
        download.fetch(NAME, folder, server.url)
    assert path.read_bytes() == b"other"


def test_a_file_put_there_by_hand_is_recorded(server: Server, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(server.content)
    download.fetch(NAME, tmp_path, server.url)
    check(server, tmp_path)
    assert server.requests == []


def test_a_broken_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_500_000, 0, 1_000_000]
    download.fetch(NAME, tmp_path, server.url)
    check(server, tmp_path)
    assert server.requests == [None, *["bytes=1500000-"] * 2, "bytes=2500000-"]


def test_a_stopped_download_goes_on_later(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_500_000, *[0] * 10]
    with pytest.raises(OSError, match="goes on from 1500000 bytes"):
        download.fetch(NAME, tmp_path, server.url)
    assert names(tmp_path) == {f"{FILE}.part", f"{FILE}.part.etag"}
    attempts = len(server.requests)
    server.break_after = []
    download.fetch(NAME, tmp_path, server.url)
    check(server, tmp_path)
    assert server.requests[attempts:] == ["bytes=1500000-"]


def test_a_part_of_another_file_is_not_continued(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_500_000, *[0] * 10]
    with pytest.raises(OSError, match="goes on"):
        download.fetch(NAME, tmp_path, server.url)
    server.break_after = [0]
    server.etag, server.content = '"two"', server.content[::-1]
    download.fetch(NAME, tmp_path, server.url)
    check(server, tmp_path)


def test_a_part_that_is_complete_or_too_long(server: Server, tmp_path: Path) -> None:
    part, note = tmp_path / f"{FILE}.part", tmp_path / f"{FILE}.part.etag"
    for content in (server.content, server.content + b"more"):
        part.write_bytes(content)
        note.write_text('"one"')
        download.fetch(NAME, tmp_path, server.url)
        check(server, tmp_path)
        (tmp_path / FILE).unlink()
        (tmp_path / "SHA256SUMS").unlink()


@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_server_without_ranges_or_etag(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.ranges, server.etag = False, etag
    server.break_after = [1_500_000]
    download.fetch(NAME, tmp_path, server.url)
    check(server, tmp_path)


def test_what_may_be_cut_short_unseen_is_not_taken(server: Server, tmp_path: Path) -> None:
    server.lengths, server.break_after = False, [1_000_000]
    with pytest.raises(OSError, match="does not say how long the file is"):
        download.fetch(NAME, tmp_path, server.url)
    assert not (tmp_path / FILE).exists() and not (tmp_path / "SHA256SUMS").exists()


def test_a_part_that_another_download_writes_to_is_not_taken(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / f"{FILE}.part"

    def meanwhile(*_: object) -> None:
        with part.open("ab") as file:
            file.write(b"another's")

    monkeypatch.setattr(download._Progress, "show", meanwhile)
    with pytest.raises(OSError, match="another download writes there"):
        download.fetch(NAME, tmp_path, server.url)
    assert names(tmp_path) <= {part.name, f"{part.name}.etag"}


def test_attempts_that_get_no_further_have_an_end(server: Server, tmp_path: Path) -> None:
    """Without an ETag each of them begins anew, some a little further than the last one."""
    server.ranges, server.etag = False, None
    server.break_after = [200_000, 100_000] * 20
    with pytest.raises(OSError, match="the connection ended after"):
        download.fetch(NAME, tmp_path, server.url)
    assert len(server.requests) == 5


def test_another_sha256_is_not_kept(server: Server, tmp_path: Path) -> None:
    record_sha256(tmp_path / FILE, "0" * 64)
    with pytest.raises(ValueError, match=rf"is {server.sha256}, recorded is 0000"):
        download.fetch(NAME, tmp_path, server.url)
    assert names(tmp_path) == {"SHA256SUMS"}


def test_a_server_in_trouble_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 500]
    download.fetch(NAME, tmp_path, server.url)
    check(server, tmp_path)


@pytest.mark.parametrize(
    ("statuses", "content_type", "message"),
    [
        ([404], "", "the server answered 404 Not Found"),
        ([403], "", "the server answered 403 Forbidden"),
        ([503] * 5, "", "the server answered 503 Service Unavailable; the same command goes on"),
        ([], "text/html; charset=utf-8", "the server answered with a web page"),
    ],
)
def test_errors_are_one_line(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    statuses: list[int],
    content_type: str,
    message: str,
) -> None:
    server.statuses, server.content_type = statuses, content_type or server.content_type
    arguments = ["--folder", str(tmp_path), "fetch", NAME, "--mirror", server.url]
    assert weights.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {server.url}/{FILE}: ")
    assert message in error
    assert error.count("\n") == 1
    assert names(tmp_path) == set()


def test_no_server(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server() as closed:
        url = closed.url
    assert weights.main(["--folder", str(tmp_path), "fetch", NAME, "--mirror", url]) == 1
    error = capsys.readouterr().err
    assert "no connection" in error
    assert error.count("\n") == 1


def test_the_command_says_what_it_did(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--folder", str(tmp_path), "fetch", NAME, "--mirror", server.url]
    assert weights.main(arguments) == 0
    out, progress = capsys.readouterr()
    assert out == f"{tmp_path / FILE}\n"
    assert progress.splitlines()[-1] == f"{FILE}: 4 MB of 4 MB (100 %)"
    with pytest.raises(SystemExit):
        weights.main(["fetch", "sam_med2d"])
    assert "sam_med3d_turbo_cvpr_coreset" in capsys.readouterr().err
