"""Strict reading of tar headers: where each file lies in an archive, without unpacking anything.

The standard library reads archives leniently: it takes a damaged header in the middle for the end, so files would be
missing without a word. Here whatever is not understood is an error that names archive and member.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from paws_hpc.files import read_at
from paws_hpc.store.format import StoreError

BLOCK = 512
_LONGEST_NAME = 64 << 10
_LONGEST_PAX = _READ_BYTES = 1 << 20
_FILES = frozenset((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE))
_REFUSED = {
    tarfile.LNKTYPE: "a hard link (make the archive with --hard-dereference)",
    tarfile.SYMTYPE: "a symbolic link (make the archive with --dereference)",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file (make the archive without --sparse)",
}


@dataclass(frozen=True)
class Member:
    """A file in an archive: its path, and where its bytes are in the outermost archive."""

    name: str
    offset: int
    size: int


def tar_members(descriptor: int, archive: str, *, begin: int = 0, end: int | None = None) -> Iterator[Member]:
    """Walk the files of a tar archive, which may itself lie within a file.

    Args:
        descriptor: of the outermost file, open for reading; its position is not used.
        archive: what errors call the archive.
        begin, end: bytes of the file that are the archive; None: to its end.

    Raises:
        StoreError: the archive is compressed, cut off or damaged, or has members other than files and folders, paths
            that lead out of it, sizes beyond its end, or bytes behind its end marker.
    """
    end = os.fstat(descriptor).st_size if end is None else end
    place, name, size = begin, None, None
    while True:
        block = _read(descriptor, place, BLOCK, end, archive)
        if not any(block):
            break
        header = _parse(block, archive, place, first=place == begin)
        content = place + BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            text = _extension(descriptor, header, content, end, archive)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = os.fsdecode(text.split(b"\0", 1)[0])
            elif header.type == tarfile.XHDTYPE:
                fields = _pax_fields(text, archive, place)
                name, size = fields.get("path", name), fields.get("size", size)
            place = content + _padded(header.size)
            continue
        member = Member(header.name if name is None else name, content, header.size if size is None else _number(size))
        _check(member, header.type, archive, end)
        name, size = None, None
        if header.type in _FILES and not member.name.endswith("/"):
            yield member
        place = content + _padded(0 if header.type == tarfile.DIRTYPE else member.size)
    for start in range(place, end, _READ_BYTES):
        part = read_at(descriptor, min(_READ_BYTES, end - start), start)
        if behind := part.lstrip(b"\0"):
            first = start + len(part) - len(behind)
            raise StoreError(
                f"{archive} has an end marker and {end - first:,} bytes behind it, from byte {first:,} on. If archives "
                "were joined, give them beside each other."
            )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read(descriptor: int, place: int, count: int, end: int, archive: str) -> bytes:
    """Read bytes that must be there."""
    content = read_at(descriptor, count, place) if place + count <= end else b""
    if len(content) < count:
        raise StoreError(f"{archive} is cut off: a header is missing at byte {place:,}. Get the archive again.")
    return content


def _parse(block: bytes, archive: str, place: int, *, first: bool) -> tarfile.TarInfo:
    """Parse one header block; its checksum must fit."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if first:
            packed = (
                block[:2] == b"\x1f\x8b" or block[:3] == b"BZh" or block[:6] in (b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
            )
            remedy = "It is compressed: decompress it first." if packed else "Is it the right file?"
            raise StoreError(f"{archive} is not a tar archive ({error}). {remedy}") from error
        raise StoreError(
            f"{archive} is damaged: byte {place:,} is not a header ({error}). Get the archive again."
        ) from error
    if header.size < 0:
        raise StoreError(f"{archive} is damaged: member {header.name!r} has a size of {header.size} bytes.")
    return header


def _extension(descriptor: int, header: tarfile.TarInfo, place: int, end: int, archive: str) -> bytes:
    """Content of a header that describes the next one."""
    longest = _LONGEST_PAX if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE) else _LONGEST_NAME
    if header.size > longest:
        raise StoreError(
            f"{archive} has a name or header of {header.size:,} bytes at byte {place:,}: too long to be one."
        )
    return _read(descriptor, place, header.size, end, archive)


def _pax_fields(text: bytes, archive: str, place: int) -> dict[str, str]:
    """Fields of an extended header: lines of "<length> <name>=<value>\\n"."""
    fields: dict[str, str] = {}
    while text.rstrip(b"\0"):
        length_text, _, _ = text.partition(b" ")
        length = int(length_text) if length_text.isdigit() and len(length_text) < 8 else 0
        line, text = text[len(length_text) + 1 : length], text[length:]
        name, equals, value = line[:-1].partition(b"=")
        if not equals or line[-1:] != b"\n":
            raise StoreError(f"{archive} is damaged: the extended header at byte {place:,} cannot be read.")
        if name.startswith(b"GNU.sparse"):
            raise StoreError(f"{archive} has {_REFUSED[tarfile.GNUTYPE_SPARSE]} at byte {place:,}.")
        fields[os.fsdecode(name)] = os.fsdecode(value)
    return fields


def _number(size: str) -> int:
    """A size in an extended header; what is no number is too large for any archive."""
    return int(size) if size.isascii() and size.isdigit() and len(size) < 20 else 1 << 64


def _check(member: Member, kind: bytes, archive: str, end: int) -> None:
    """Refuse what is not a file or folder inside the archive."""
    if kind not in _FILES and kind != tarfile.DIRTYPE:
        what = _REFUSED.get(kind, f"of unknown type {kind!r}")
        raise StoreError(f"{archive}: member {member.name!r} is {what}. Only files and folders are read.")
    if not member.name or member.name.startswith("/") or ".." in member.name.split("/") or "\0" in member.name:
        raise StoreError(f"{archive}: member {member.name!r} leads out of the archive. Make the archive again.")
    if kind in _FILES and member.size > end - member.offset:
        raise StoreError(
            f"{archive} is cut off or damaged: member {member.name!r} has {member.size:,} bytes, "
            f"{max(end - member.offset, 0):,} are left. Get the archive again."
        )
