"""Files from the web: resumed where a download broke, checked, whole or absent."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import sha256_of

CHUNK = 1 << 20
Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says


def download(url: str, file: Path, progress: Progress | None = None) -> None:
    """Fetches url into file by way of FILE.part, which a broken download leaves and the next one goes on with.

    The part is bound to the server's ETag, kept beside it: another version of the file is begun anew.

    Raises:
        FileNotFoundError: the server cannot be reached or has no such file; says what to put where by hand.
        ValueError: the connection broke before the end: how much is there.
    """
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url} is no http address; fetch it by hand to {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    part, tag = (file.with_name(f"{file.name}.{suffix}") for suffix in ("part", "etag"))
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "steadyflow"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag.read_text()} if tag.exists() else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            resumed = answer.status == 206
            have = have if resumed else 0
            total = int(answer.headers["Content-Length"]) + have if answer.headers["Content-Length"] else None
            tag.write_text(answer.headers["ETag"] or "")
            if not answer.headers["ETag"]:
                tag.unlink()
            with part.open("ab" if resumed else "wb") as stream:
                while chunk := answer.read(CHUNK):
                    stream.write(chunk)
                    have += len(chunk)
                    if progress:
                        progress(have, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to fetch, or the file has changed
            part.unlink()
            tag.unlink(missing_ok=True)
            return download(url, file, progress)
        raise FileNotFoundError(f"{url} answers {error.code} {error.reason}; {by_hand(url, file)}") from error
    except (OSError, HTTPException) as error:
        if part.exists() and part.stat().st_size:
            raise ValueError(_broken(url, part.stat().st_size, None)) from error
        raise FileNotFoundError(f"cannot reach {url} ({error}); {by_hand(url, file)}") from error
    if total is not None and have < total:
        raise ValueError(_broken(url, have, total))
    part.replace(file)
    tag.unlink(missing_ok=True)
    return None


def _broken(url: str, have: int, total: int | None) -> str:
    of = f" of {total}" if total is not None else ""
    return f"truncated download of {url}: {have}{of} bytes are here; the same command goes on from there"


def by_hand(url: str | None, file: Path) -> str:
    """What to do without a connection."""
    return f"without a connection, put {url or 'it'} at {file}"


def verify(file: Path, sha256: str | None, md5: str | None = None) -> str:
    """That a file is the one it should be: by its published hash, and by the one recorded when it first came.

    Returns:
        its sha256.

    Raises:
        ValueError: it is not; both hashes.
    """
    record, found = file.with_name(f"{file.name}.sha256"), sha256_of(file)
    recorded = record.read_text().split()[0] if record.exists() else None
    expected = [
        ("sha256", sha256, found, "its config"),
        ("sha256", recorded, found, f"{record.name}, of its first use,"),
    ]
    if md5 is not None:
        with file.open("rb") as stream:
            expected.append(("md5", md5, hashlib.file_digest(stream, "md5").hexdigest(), "its config"))
    for kind, right, other, source in expected:
        if right is not None and other != right.lower():
            raise ValueError(
                f"{file} is not what it should be: {source} says {kind} {right}, found {other}; delete it and fetch it "
                "again"
            )
    if recorded is None:
        with whole_file(record) as temporary:
            temporary.write_text(f"{found}  {file.name}\n")
    return found
