"""A file is whole or absent, and is recognised by its content."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from paws_hpc.command import error_text
from paws_hpc.files import (
    atomic_write,
    exclusive,
    file_hash,
    read_json,
    read_lines,
    read_record,
    value_digest,
    write_json,
    write_record,
    write_text,
)


def test_nobody_sees_a_file_that_is_half_written_and_an_error_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    with atomic_write(path) as file:
        file.write(b"old")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"old"

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_an_error_of_the_disk_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with pytest.raises(OSError, match=f"cannot write {path}: No space left") as caught, atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device", "/some/temporary/name")
    assert caught.value.errno == errno.ENOSPC
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        write_text(tmp_path / "file" / "below", "text")


def test_json_has_no_nan_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"accuracy": float("nan")})
    assert read_json(path) == {"accuracy": 0.5}
    path.write_text('{"accuracy": 0.5')
    with pytest.raises(ValueError, match=f"{path} is not valid JSON: .*line 1.*Restore it or remove it"):
        read_json(path)
    path.write_bytes(b'{"name": "\xff"}')
    with pytest.raises(ValueError, match=f"{path} is not valid JSON"):
        read_json(path)


def test_a_record_with_any_flipped_bit_is_refused_by_name_or_says_the_same(tmp_path: Path) -> None:
    path, value = tmp_path / "selected.json", {"trial": "lr=0.05,epochs=30", "scores": [0.5, 1.0], "café": None}
    write_record(path, value)
    assert read_record(path) == read_json(path) == value
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        with suppress(ValueError):
            assert read_record(path) == value
            continue
        with pytest.raises(ValueError, match=r"selected\.json (is not valid JSON|is damaged|has no checksum)"):
            read_record(path)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, "NaN", '{"checksum": 1, "a": Infinity}', "\ud800"],
    ids=["lists", "objects", "nan", "infinity", "surrogate"],
)
def test_hostile_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError, match=r"result\.json is not valid JSON"):
        read_json(path)


def test_an_error_of_the_disk_in_keeping_a_name_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO means that the rename may be lost; what a file system cannot do is no error."""
    fsync = os.fsync
    for code, fails in ((errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False), (errno.ENOTSUP, False)):

        def of_folders(descriptor: int, code: int = code) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", of_folders)
        with pytest.raises(OSError, match=f"cannot sync {tmp_path}") if fails else nullcontext():
            write_json(tmp_path / "state.json", {})


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As Lustre without -o flock, and NFS without lockd."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(OSError, match=f"cannot lock {tmp_path / 'lock'}: .*Lustre: mounted with flock"),
        exclusive(tmp_path / "lock"),
    ):
        pass


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_lists_are_read_as_editors_save_them(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "labels.csv"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + "größe,1\r\nb,2\n").encode(encoding))
    assert read_lines(path) == ["größe,1", "b,2"]
    path.write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path} is no text in UTF-8"):
        read_lines(path)


def test_digests_follow_values_not_spelling(tmp_path: Path) -> None:
    assert value_digest({"b": [1, 2.5], "a": None}) == value_digest({"a": None, "b": (1, 2.5)})
    assert value_digest({"a": 1}) != value_digest({"a": 1.5})
    # Digests lie in files that other versions of this program read: they may never change.
    assert value_digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    path = tmp_path / "shard"
    path.write_bytes(bytes(1000))
    before = file_hash(path)
    path.write_bytes(bytes(999) + b"\x01")
    assert len(before) == 32
    assert file_hash(path) != before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "cannot write /a/b: No space left on device", "/a/b"), "cannot write /a/b: No space"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system. Name a place"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), "/a/b: No such file or directory"),
        (OSError("a text of our own"), "a text of our own"),
        (ValueError("a value"), "a value"),
    ],
)
def test_an_error_names_its_file_once(error: Exception, said: str) -> None:
    told = error_text(error)
    assert told.startswith(said)
    assert told.count("/a/b") == said.count("/a/b")
    assert ("Free some space" in told) == ("No space" in said)
