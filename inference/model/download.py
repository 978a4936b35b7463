"""Download of public checkpoints, with progress, resume and a recorded SHA-256.

Only on explicit demand (``python -m inference.model.weights fetch NAME``), never at inference.
"""

from __future__ import annotations

import http.client
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from inference.model.weights import listed_sha256, record_sha256, sha256_of, verify_weights

#: Where the checkpoints are published; ``/NAME.pth`` follows.
MIRROR = "https://huggingface.co/blueyo0/SAM-Med3D/resolve/main"

_ATTEMPTS = 5
_CHUNK = 1 << 20
_TIMEOUT_S = 30.0


def fetch(name: str, folder: Path, mirror: str = MIRROR) -> Path:
    """Download ``NAME.pth`` into a folder, or verify it where it is there already.

    The file grows under ``NAME.pth.part``, which a broken or stopped download leaves for the next
    one, and gets its name when it is complete and its SHA-256 is right. The first download of a
    file records that SHA-256 in ``SHA256SUMS`` beside it; later ones, and every use of the file,
    are checked against the record.

    Args:
        name: the checkpoint, without suffix.
        folder: made where it is missing.
        mirror: base address.

    Returns:
        The path of the file.

    Raises:
        OSError: the network or the disk failed, after several attempts; what arrived is kept.
        ValueError: the SHA-256 is not the recorded one; a download is removed, a file that was
            there before is left alone.
    """
    path = folder / f"{name}.pth"
    if path.is_file():
        if not verify_weights(path):
            record_sha256(path, sha256_of(path))
        return path
    folder.mkdir(parents=True, exist_ok=True)
    url = f"{mirror.rstrip('/')}/{path.name}"
    part = path.with_name(f"{path.name}.part")
    _download_all(url, part)
    digest = sha256_of(part)
    listed = listed_sha256(path)
    if listed not in (None, digest):
        _discard(part)
        raise ValueError(f"{url}: its SHA-256 is {digest}, recorded is {listed}: not kept")
    part.replace(path)
    _discard(part)
    if listed is None:
        record_sha256(path, digest)
    return path


def _download_all(url: str, part: Path) -> None:
    """Bring ``part`` to its full length, trying again after a failure on the way."""
    failures = most = 0  # failures in a row, without more than ever before
    while True:
        most = max(most, _size(part))
        try:
            _download_rest(url, part)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                raise OSError(f"{url}: the server answered {error.code} {error.reason}") from error
            failure = f"the server answered {error.code} {error.reason}"
        except urllib.error.URLError as error:
            failure = f"no connection ({error.reason})"
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            failure = str(error) or type(error).__name__
        failures = 1 if _size(part) > most else failures + 1
        if failures == _ATTEMPTS:
            raise OSError(f"{url}: {failure}; the same command goes on from {_size(part)} bytes")
        time.sleep(2.0 ** (failures - 1))


def _size(path: Path) -> int:
    """The length of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


class _BrokenOffError(ConnectionError):
    """The connection ended before the file did."""


def _download_rest(url: str, part: Path) -> None:
    """Append to ``part`` what it lacks, in one request.

    A part is only continued if the file on the server is still the one it came from, told by the
    ETag noted beside it; else it starts again.
    """
    version = _version_of(part)
    have = _size(part) if version else 0
    request = urllib.request.Request(url, headers={"User-Agent": "sam-med3d-weights"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        error.close()
        if error.headers.get("ETag") == version and error.headers.get("Content-Range") == (
            f"bytes */{have}"
        ):
            return  # all of it had arrived
        _discard(part)
        _download_rest(url, part)
        return
    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError(f"{url}: the server answered with a web page, not with the file")
        etag = response.headers.get("ETag")
        continued = have > 0 and response.status == 206
        if continued and (etag != version or _range_start(response) != have):
            response.close()
            _discard(part)
            _download_rest(url, part)
            return
        if not continued:
            have = 0
            _discard(part)
            if etag:
                _note_of(part).write_text(etag, encoding="utf-8")
        length = response.headers.get("Content-Length")
        if not length and "chunked" not in response.headers.get("Transfer-Encoding", ""):
            raise OSError(f"{url}: the server does not say how long the file is")
        total = have + int(length) if length else None
        _append(response, part, have, total)


def _append(response: http.client.HTTPResponse, part: Path, have: int, total: int | None) -> None:
    """Write a response's body to the end of ``part`` and check that all of it came."""
    progress = _Progress(part.name.removesuffix(".part"), total)
    with part.open("ab") as file:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            have += len(chunk)
            progress.show(have)
    progress.end()
    if total is not None and have != total:
        raise _BrokenOffError(f"the connection ended after {have} of {total} bytes")
    if _size(part) != have:
        raise OSError(f"{part}: another download writes there, too; wait for it, or remove it")


def _range_start(response: http.client.HTTPResponse) -> int | None:
    """The first byte of a partial answer, from its Content-Range."""
    unit, _, rest = (response.headers.get("Content-Range") or "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def _note_of(part: Path) -> Path:
    """The file that holds the ETag of what ``part`` is a part of."""
    return part.with_name(f"{part.name}.etag")


def _version_of(part: Path) -> str | None:
    """The ETag noted beside ``part``, or None."""
    note = _note_of(part)
    return note.read_text(encoding="utf-8") if note.is_file() else None


def _discard(part: Path) -> None:
    """Remove a part and its note."""
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)


class _Progress:
    """A line on stderr: redrawn on a terminal, one every tenth of the way elsewhere."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.first: int | None = None
        self.tenth = -1

    def show(self, have: int) -> None:
        """Report that ``have`` bytes are there."""
        if self.first is None:
            self.first, self.start = have, time.monotonic()
        rate = (have - self.first) / max(time.monotonic() - self.start, 1e-3) / 1e6
        text = f"{self.name}: {have / 1e6:.0f} MB"
        tenth = 0
        if self.total:
            tenth = 10 * have // self.total
            text = f"{text} of {self.total / 1e6:.0f} MB ({100 * have // self.total} %)"
        if self.terminal:
            print(f"\r{text}, {rate:.1f} MB/s  ", end="", file=sys.stderr, flush=True)
        elif tenth > self.tenth:
            print(text, file=sys.stderr, flush=True)
        self.tenth = tenth

    def end(self) -> None:
        """Close the line."""
        if self.terminal:
            print(file=sys.stderr)
