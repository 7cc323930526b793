"""Files that are either whole or absent, and the digests by which they are recognised."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path`` only when the block ends without an error.

    On any error, a full disk included, whatever stood at ``path`` stays, and nothing beside it.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number alone is not unique on a shared file system: jobs on two nodes may have the same one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # a read-only disk has no such file, and will not have it removed either
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}", str(path)) from error
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # makes the rename survive a power cut; some network file systems refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; the system gives it up when the process ends, however it ends.

    If another process holds it, ValueError says ``busy``; without ``busy`` that process is waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ValueError(busy) from error
        yield


def try_lock(file: BinaryIO | int) -> bool:
    """Lock an open file or descriptor (flock) for this process alone, unless others have it: False, without waiting.

    A shared lock that this process had is lost in either case.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Read ``count`` bytes from ``offset``, fewer only where the file ends; network file systems may give less at once.

    Raises:
        OSError: the file cannot be read.
    """
    content = os.pread(descriptor, count, offset)
    while 0 < len(content) < count:
        more = os.pread(descriptor, count - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused: JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def create_json(path: Path, value: Any) -> None:
    """Write ``value`` as a file that nobody else has created: of several writers, on any machine, one succeeds.

    Raises:
        FileExistsError: somebody was first; their file stays.
    """
    mine = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    write_json(mine, value)
    try:
        os.link(mine, path)  # atomic on network file systems too, and the file is whole when it appears
    except FileExistsError:
        if mine.stat().st_nlink != 2:  # it is 2 if the link was made and only NFS's answer got lost
            raise
    finally:
        mine.unlink()


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError names one that is not JSON, with the position of the fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Restore it or remove it and run again.") from error


def file_hash(path: Path) -> str:
    """128-bit xxh3 of a file's bytes, as 32 hexadecimal digits: detects damage, not malice."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def value_digest(value: Any) -> str:
    """SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces), as 64 hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
