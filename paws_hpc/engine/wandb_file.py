"""The file that Weights & Biases keeps of a run: its records, also of a file that was torn off or damaged.

``run-<id>.wandb`` begins with seven bytes; then follow blocks of 32 KiB in LevelDB's log format. A record is one
or more fragments, none of which crosses a block: CRC-32 of kind and content (4 bytes), length (2), kind (1: a whole
record, 2, 3, 4: its first, a middle, its last part), content; little endian. A content is a serialised ``Record``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 15
_OPENING = b":W&B\xe1\xbe\0"  # a name, a magic number, version 0
_FRAGMENT = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_contents(path: Path) -> tuple[list[bytes], bool]:
    """The records of a file that are whole, and whether there is anything else beside them.

    A file that is being written to ends in the middle of a record too.
    """
    data = path.read_bytes()
    contents: list[bytes] = []
    parts: bytes | None = None
    broken = False
    before = end = len(_OPENING)
    for position, kind, content in _whole_fragments(data):
        if data[before:position].strip(b"\0"):  # of anything but what fills a block up
            broken, parts = True, None
        before = position + _FRAGMENT.size + len(content)
        if kind in (_WHOLE, _FIRST):
            parts = content
        elif parts is not None:
            parts += content
        if kind in (_WHOLE, _LAST) and parts is not None:
            contents.append(parts)
            parts, end = None, before
    return contents, broken or data[end:].strip(b"\0") != b""


def _whole_fragments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Where each undamaged fragment begins, its kind and its content; the next one is looked for at every byte."""
    position = len(_OPENING)
    while position + _FRAGMENT.size <= len(data):
        if (left := _BLOCK - position % _BLOCK) < _FRAGMENT.size:
            position += left
            continue
        checksum, length, kind = _FRAGMENT.unpack_from(data, position)
        if _WHOLE <= kind <= _LAST and length <= min(left, len(data) - position) - _FRAGMENT.size:
            content = data[position + _FRAGMENT.size : position + _FRAGMENT.size + length]
            if zlib.crc32(content, zlib.crc32(bytes([kind]))) == checksum:
                yield position, kind, content
                position += _FRAGMENT.size + length
                continue
        position += 1


def write_contents(path: Path, contents: Iterable[bytes]) -> None:
    """Write records as a file."""
    with open(path, "wb") as file:
        file.write(_OPENING)
        for content in contents:
            for fragment in _fragments(content, file.tell()):
                file.write(fragment)


def _fragments(content: bytes, position: int) -> Iterator[bytes]:
    first = True
    while True:
        if (left := _BLOCK - position % _BLOCK) < _FRAGMENT.size:
            yield bytes(left)
            position += left
            continue
        part, content = content[: left - _FRAGMENT.size], content[left - _FRAGMENT.size :]
        kind = (_WHOLE if first else _LAST) if not content else (_FIRST if first else _MIDDLE)
        yield _FRAGMENT.pack(zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
        position += _FRAGMENT.size + len(part)
        first = False
        if not content:
            return


def parse(content: bytes) -> Any:
    """A record as wandb's ``Record``."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415 - a second that a reader of no record need not pay

    record = wandb_internal_pb2.Record()
    record.ParseFromString(content)
    return record


def history_steps(path: Path) -> list[int]:
    """W&B's steps of the rows that a file holds whole, in its order."""
    return steps_of(read_contents(path)[0])


def steps_of(contents: Iterable[bytes]) -> list[int]:
    """W&B's steps of the rows among records."""
    return [record.history.step.num for record in map(parse, contents) if record.HasField("history")]
