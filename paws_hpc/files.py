"""Files that are either whole or absent, and the checksums by which damage is noticed.

What decides a result carries its own checksum, so that it can be moved and copied: a record (JSON) under ``checksum``,
YAML in its first line, and arrays and tensors in a seal behind their last byte.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
import yaml  # type: ignore[import-untyped]

SEAL = b"xxh3-128"
_SEAL_BYTES = len(SEAL) + 16
_CHECKSUM = "checksum"
_YAML_CHECKSUM = "# checksum of what follows: "
_MOST_YAML, _MOST_DEPTH = 1 << 20, 20  # bytes, and levels
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # from file systems without it


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path`` only when the block ends without an error.

    On any error, a full disk included, whatever stood at ``path`` stays, and nothing beside it.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is named.
    """
    make_folder(path.parent)
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
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}", str(path)) from error
        raise
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, with its parents, that survives a power cut."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut, where the file system can (some network ones cannot).

    Raises:
        OSError: it may be lost; it is named.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno or errno.EIO, f"cannot sync {path}: {error.strerror}", str(path)) from error
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
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"cannot lock {path}: {error.strerror}. Its file system needs locks (Lustre: mounted with flock; NFS: "
                "lockd running); otherwise name a folder on another one",
                str(path),
            ) from error
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


def read_lines(path: Path) -> list[str]:
    """The lines of a text as people save it: in UTF-8, or in what its byte order mark says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of another encoding; it is named.
    """
    content = path.read_bytes()
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf_16 else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}). Save it so.") from error


class UnsealedError(ValueError):
    """A file has no checksum: it is cut off, damaged, or from an older version."""


class Sealing:
    """A file to write to, and the hash of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.hash, self._file = xxhash.xxh3_128(), file

    def write(self, data: bytes) -> int:
        """Append ``data``."""
        self.hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Give what was written to the system."""
        self._file.flush()


@contextmanager
def sealed_write(path: Path, *, fence: Callable[[], None] = lambda: None) -> Iterator[Sealing]:
    """As :func:`atomic_write`, with a seal at the file's end: :data:`SEAL` and the xxh3 of what stands before.

    The hash is of what the block writes, and the file is read back, so that a bit that flips on the way is noticed.
    ``fence`` is called when all is on disk but nothing is visible yet; if it raises, ``path`` stays as it was.

    Raises:
        OSError: the folder cannot be written, the disk is full, or the file reads back otherwise; ``path`` is named.
    """
    with atomic_write(path) as file:
        sealing = Sealing(file)
        yield sealing
        file.write(SEAL + sealing.hash.digest())
        file.flush()
        os.fsync(file.fileno())  # which may take long, so it comes before the fence
        try:
            sealed_digest(Path(file.name))
        except ValueError as error:
            raise OSError(errno.EIO, "it reads back otherwise than it was written", str(path)) from error
        fence()


def sealed_digest(path: Path) -> str:
    """The checksum of what :func:`sealed_write` wrote, which fits its bytes (32 hexadecimal digits).

    Raises:
        UnsealedError: it does not end in a seal.
        ValueError: the seal does not fit.
    """
    found, left = xxhash.xxh3_128(), path.stat().st_size - _SEAL_BYTES
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 8 << 20))):
            found.update(block)
            left -= len(block)
        seal = file.read()
    if not seal.startswith(SEAL):
        raise UnsealedError(f"{path} is cut off, or from an older version: it has no checksum. Make it anew.")
    if seal != SEAL + found.digest():
        raise ValueError(f"{path} is damaged: it does not fit its checksum. Restore it or make it anew.")
    return found.hexdigest()


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
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or is a record that does not fit its checksum; it is named.
    """
    return _read(path)[0]


def yaml_fault(error: yaml.YAMLError) -> str:
    """Where a YAML file has its fault, in one line."""
    return f"{' '.join(str(error).split())}. Mend this YAML file."


def read_record(path: Path) -> dict[str, Any]:
    """Read what :func:`write_record` wrote, without its checksum; errors as of :func:`read_json`."""
    value, is_record = _read(path)
    if not is_record:
        raise UnsealedError(f"{path} has no checksum: it is damaged or from an older version. Remove it and run again.")
    return dict(value)


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with its checksum, atomically."""
    write_json(path, value | {_CHECKSUM: value_digest(value)})


def _read(path: Path) -> tuple[Any, bool]:
    """What a JSON file holds, and whether it is a record, which fits its checksum."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_in_json)
    except (ValueError, RecursionError) as error:  # ValueError where it is not UTF-8, too
        raise ValueError(f"{path} is not valid JSON: {error}. Restore it or remove it and run again.") from error
    if not isinstance(value, dict) or _CHECKSUM not in value:
        return value, False
    if value.pop(_CHECKSUM) != value_digest(value):
        raise ValueError(f"{path} is damaged or was edited: it does not fit its checksum. Restore it or remove it.")
    return value, True


def write_yaml_text(path: Path, text: str) -> None:
    """Write YAML with its checksum in a first line, atomically."""
    write_text(path, f"{_YAML_CHECKSUM}{_text_digest(text)}\n{text}")


def read_yaml(path: Path) -> Any:
    """Read YAML that a program wrote; errors as of :func:`read_yaml_text`."""
    try:
        return yaml.load(read_yaml_text(path), Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {yaml_fault(error)}") from error


def read_yaml_text(path: Path) -> str:
    """Read the text of YAML that a program wrote: plain, and fitting its checksum if it has one.

    Others may have written it, to no good: a short text with aliases can stand for gigabytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit its checksum, is not YAML, is large or deeply nested, or has aliases; it is named.
    """
    if (size := path.stat().st_size) > _MOST_YAML:
        raise ValueError(f"{path} has {size:,} bytes, and a config of at most {_MOST_YAML:,} was expected.")
    try:
        text = path.read_text(encoding="utf-8")
        fault = _not_plain(text)
    except (ValueError, yaml.YAMLError) as error:
        fault = " ".join(str(error).split())
    if fault is not None:
        raise ValueError(f"{path} is damaged or was edited: {fault}.")
    return text


def _not_plain(text: str) -> str | None:
    if text.startswith(_YAML_CHECKSUM):
        first, _, rest = text.partition("\n")
        if first.removeprefix(_YAML_CHECKSUM) != _text_digest(rest):
            return "it does not fit its checksum. Restore it, or remove its first line if you edited it"
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH or isinstance(event, yaml.AliasEvent):
            return f"line {event.start_mark.line + 1} has an alias, or is nested too deeply"
    return None


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _not_in_json(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


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
