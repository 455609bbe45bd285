"""Files from the web: resumed where a download broke, checked, whole or absent."""

import fcntl
import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import Any

from steadyflow.checkpoints.nodes import shown
from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import sha256_of

CHUNK = 1 << 20
Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says


def download(
    url: str, file: Path, progress: Progress | None = None, sha256: str | None = None, md5: str | None = None
) -> None:
    """Fetches url into file by way of FILE.part, which a broken download leaves and the next one goes on with.

    The part is bound to the server's ETag or Last-Modified, kept beside it as FILE.version: another version of the
    file is begun anew, and so is a file of which the server tells none. What came is checked before it becomes FILE;
    if it is another than it should be, it is deleted.

    Args:
        sha256, md5: as `verify`.

    Raises:
        FileNotFoundError: the server cannot be reached or has no such file; says what to put where by hand.
        ValueError: the connection broke before the end (how much is there), what came is another file than it should
            be, or another process is fetching into the same folder.
    """
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url} is no http address; fetch it by hand to {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    part, version = (file.with_name(f"{file.name}.{suffix}") for suffix in ("part", "version"))
    with _alone(file.parent):
        try:
            while not _fetch(url, part, version, progress):
                part.unlink()  # nothing can be joined to it
        except urllib.error.HTTPError as error:
            said = f"{error.code} {shown(error.reason, 200)}"
            then = "try again later; " if error.code == 429 or error.code >= 500 else ""  # it is busy, or broken
            raise FileNotFoundError(f"{url} answers {said}; {then}{by_hand(url, file)}") from error
        except (OSError, HTTPException) as error:
            if part.exists() and part.stat().st_size:
                raise ValueError(_broken(url, part, version, f"bytes are here ({shown(str(error), 200)})")) from error
            raise FileNotFoundError(f"cannot reach {url} ({shown(str(error), 200)}); {by_hand(url, file)}") from error
        wrong = _compare(part, file, sha256, md5)[1]
        if wrong:
            part.unlink()
        else:
            part.replace(file)
        version.unlink(missing_ok=True)
    if wrong:
        raise ValueError(f"{url} is not what it should be: {wrong}; what came is deleted, try again")


def _fetch(url: str, part: Path, version: Path, progress: Progress | None) -> bool:
    """Fetches what is missing of the part; False if what the server has cannot be joined to what is there."""
    of = version.read_text() if version.exists() else ""
    have = part.stat().st_size if of and part.exists() else 0
    headers = {"User-Agent": "steadyflow"} | ({"Range": f"bytes={have}-", "If-Range": of} if have else {})
    try:
        answer = urllib.request.build_opener(_Redirects).open(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        return bool(error.headers["Content-Range"] == f"bytes */{have}")  # all of it is there, or it is of another file
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise ValueError(f"{url} answers with a web page; fetch the file by hand to {part.with_suffix('')}")
        if (encoding := answer.headers["Content-Encoding"] or "identity") != "identity":
            raise ValueError(f"{url} answers in {encoding}, unasked; fetch the file by hand to {part.with_suffix('')}")
        span = answer.headers["Content-Range"] or ""  # as bytes 5-9/10
        if answer.status != 206:
            have = 0
        elif not have:
            raise HTTPException("it sends a part, asked for the whole")
        elif not span.startswith(f"bytes {have}-") or _version(answer.headers) not in ("", of):
            return False  # some servers do not know If-Range
        whole = span.rpartition("/")[2]
        total = int(whole) if whole.isdecimal() else None if answer.length is None else have + answer.length
        with part.open("ab" if have else "wb") as stream:
            if not have:  # after the old part is gone
                version.write_text(_version(answer.headers))
            while chunk := answer.read(CHUNK):
                stream.write(chunk)
                have += len(chunk)
                if progress:
                    progress(have, total)
    if total is not None and have < total:
        raise ValueError(_broken(url, part, version, f"of {total} bytes are here"))
    return True


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirections to the web, and none from https to a connection that anybody between can read and change."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.startswith(("https://",) if req.type == "https" else ("https://", "http://")):
            raise ValueError(f"{req.full_url} redirects to {newurl}, which is not {req.type}: it is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _version(headers: Message) -> str:
    """What names the version of a file: a strong ETag, else the time of its last change, else nothing."""
    tag = headers["ETag"] or ""
    return tag if tag.startswith('"') else headers["Last-Modified"] or ""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from fetching into the folder until the block ends, or the process however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process is fetching into {folder} now; wait until it has ended") from None
        except OSError:
            pass  # a file system without locks
        yield


def _broken(url: str, part: Path, version: Path, there: str) -> str:
    known = version.exists() and version.read_text()
    then = "goes on from there" if known else "begins anew, as the server names no version"
    return f"truncated download of {url}: {part.stat().st_size} {there}; the same command {then}"


def by_hand(url: str | None, file: Path) -> str:
    """What to do without a connection."""
    return f"without a connection, put {url or 'it'} at {file}"


def verify(file: Path, sha256: str | None, md5: str | None = None) -> str:
    """That a file is the one it should be: by its published hash, and by the one recorded at its first use.

    Returns:
        its sha256.

    Raises:
        ValueError: it is not; both hashes.
    """
    found, wrong = _compare(file, file, sha256, md5)
    if wrong:
        raise ValueError(f"{file} is not what it should be: {wrong}; delete the file and fetch it again")
    return found


def record(file: Path, sha256: str) -> None:
    """Keeps the hash of a file that has turned out to be right, which `verify` and `download` compare ever after."""
    with whole_file(_record_of(file)) as temporary:
        temporary.write_text(f"{sha256}  {file.name}\n")


def _record_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _compare(content: Path, file: Path, sha256: str | None, md5: str | None) -> tuple[str, str | None]:
    """The sha256 of `content`, and how it differs from what `file` should be."""
    found, kept = sha256_of(content), _record_of(file)
    expected = [("sha256", sha256, found, "its config")]
    if md5 is not None:
        with content.open("rb") as stream:
            expected.append(("md5", md5, hashlib.file_digest(stream, "md5").hexdigest(), "its config"))
    if kept.exists():
        recorded = f"{kept} (to be deleted if the file was published anew)"
        expected.append(("sha256", kept.read_text().split()[0], found, recorded))
    for kind, right, other, source in expected:
        if right is not None and other != right.lower():
            return found, f"{source} says {kind} {right}, found {other}"
    return found, None
