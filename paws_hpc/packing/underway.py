"""A pack that is not finished: what belongs to it, which shards are done, and how it becomes a store.

Everything lies in ``.packing`` inside the store's folder, so that a former store stays as it is until the new one is
whole:

    pack.json             which source and options it belongs to
    listing.bin           the source's files, so that other parts of the work need not list them again
    shard-00042.h5        a finished shard
    shard-00042.json      its result, written after it
    complete.json         all shards are done and move into their places: it can be finished, not undone

Any number of processes on any nodes may work in it at once. They write equal files, each by a rename, none takes away
what another put in place, and every step of the end can be repeated, so none needs a lock. While ``complete.json`` is
there no reader opens the store, whose folder may hold shards of two; the last step renames ``.packing`` away, at once.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paws_hpc.files import create_json, read_json, value_digest, write_json
from paws_hpc.packing.building import ShardResult
from paws_hpc.packing.sources.listing import Listing
from paws_hpc.store.format import (
    MANIFEST_NAME,
    MOVING_NAME,
    UNDERWAY_NAME,
    Origin,
    Packing,
    ShardEntry,
    StoreError,
    shard_name,
)
from paws_hpc.store.shard import read_shard

CHANGES_NAME = "changes.tsv"
_RECORD = "pack.json"
_LISTING = "listing.bin"
_DEAD_AFTER_S = 3600.0


@dataclass(frozen=True)
class Identity:
    """What decides the bytes of a store: two packs with equal identities make equal stores."""

    origin: Origin
    packing: Packing

    def to_json(self) -> dict[str, Any]:
        """The fields of origin and packing as JSON values."""
        return asdict(self.origin) | asdict(self.packing)

    def differences(self, other: dict[str, Any], *, but: tuple[str, ...] = ()) -> list[str]:
        """How another identity, as JSON values, differs in fields other than ``but``."""
        return [
            f"{name}={other.get(name)!r} (wanted {value!r})"
            for name, value in self.to_json().items()
            if name not in but and other.get(name) != value
        ]


class Underway:
    """The unfinished pack in a store's folder.

    Attributes:
        destination: the store's folder.
        folder: ``.packing`` in it.
    """

    def __init__(self, destination: Path) -> None:
        """Name the folder; creates nothing."""
        self.destination, self.folder = destination, destination / UNDERWAY_NAME

    def identity(self) -> dict[str, Any] | None:
        """To what the unfinished pack belongs; None if there is none.

        Raises:
            StoreError: the record is damaged.
        """
        try:
            value = read_json(self.folder / _RECORD)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{error} Or begin anew with --force.") from error
        return value if isinstance(value, dict) else {}

    def begin(self, identity: Identity, *, force: bool) -> None:
        """Continue the unfinished pack of this identity, or begin one.

        Args:
            identity: of the source and options.
            force: discard an unfinished pack of another identity.

        Raises:
            StoreError: an unfinished pack of another source or with other options is there.
            OSError: the folder cannot be written.
        """
        try:
            there = self.identity()
        except StoreError:
            if not force:
                raise
            there = {}
        if there is None:
            with suppress(FileExistsError):  # another part of the same work began it, which is compared below
                create_json(self.folder / _RECORD, identity.to_json())
            there = self.identity() or {}
        # Shards without a skipped image are the same whatever is done about such images; see result().
        differing = identity.differences(there, but=("on_error",))
        if differing and force:
            if self.is_ending():  # what is in the folder is not one store any more, and must not look like it
                (self.destination / MANIFEST_NAME).unlink(missing_ok=True)
            self.discard()
            self.begin(identity, force=False)
        elif differing:
            raise StoreError(
                f"{self.destination} holds the unfinished pack of another source, or with other options: "
                f"{', '.join(differing)}. Finish that one, choose another folder, or discard it with --force."
            )
        self._remove_dead_files()

    def discard(self) -> None:
        """Remove everything that belongs to the unfinished pack; it goes in one step, what it held in many."""
        with suppress(FileNotFoundError):  # there is none, or another process renamed it
            os.replace(self.folder, self.destination / f"{UNDERWAY_NAME}.{secrets.token_hex(8)}")
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what discarding left when it was interrupted; an unfinished pack stays."""
        for leftover in self.destination.glob(f"{UNDERWAY_NAME}.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _remove_dead_files(self) -> None:
        """Remove temporary files of killed processes; a living one writes to its file all the time."""
        for path in (*self.folder.glob(".*.tmp"), *self.destination.glob(".*.tmp")):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _DEAD_AFTER_S:
                    path.unlink()

    def listing(self) -> Listing | None:
        """What was listed when the pack began; None if nothing was kept."""
        try:
            return Listing.load(self.folder / _LISTING)
        except FileNotFoundError:
            return None

    def keep_listing(self, listing: Listing) -> None:
        """Keep the list of the source's files for the other parts of the work."""
        listing.save(self.folder / _LISTING)

    def shard_path(self, number: int) -> Path:
        """Where a shard is built."""
        return self.folder / shard_name(number)

    def keep(self, result: ShardResult) -> None:
        """Note that a shard is done."""
        value = result.to_json()
        write_json(self._result_path(result.number), value | {"checksum": value_digest(value)})

    def _result_path(self, number: int) -> Path:
        return self.shard_path(number).with_suffix(".json")

    def noted(self) -> set[int]:
        """Numbers of the shards that are noted as done, by a look at the folder only."""
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in entries]
        return {int(name[6:-5]) for name in names if name.startswith("shard-") and name.endswith(".json")}

    def result(self, number: int, fingerprint: str, *, skipping: bool) -> ShardResult | None:
        """The result of a shard that is done; None if it must be built.

        The file is there with its size, opens as HDF5, and has the index that was noted; the source's files are those
        from which it was built; no image was skipped, unless ``skipping``. Its records are not read: it was flushed to
        disk before it got its name.
        """
        try:
            value = read_json(self._result_path(number))
            checksum = value.pop("checksum")
            result = ShardResult.from_json(value)
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            return None
        if checksum != value_digest(value) or result.fingerprint != fingerprint:
            return None
        if result.skipped and not skipping:
            return None
        if result.entry is not None and not self._is_whole(result.entry):
            return None
        return result

    def _is_whole(self, entry: ShardEntry) -> bool:
        for path in self._places(entry.name):
            with suppress(OSError, StoreError):
                if path.stat().st_size == entry.bytes and read_shard(path).index.uuid == entry.uuid:
                    return True
        return False

    def _places(self, name: str) -> Iterator[Path]:
        """Where a finished shard may be: here, or in its place already."""
        yield self.folder / name
        if (final := self._final_names().get(name)) is not None:
            yield self.destination / final

    def _final_names(self) -> dict[str, str]:
        try:
            value = read_json(self.destination / MOVING_NAME)
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def find_shard(self, name: str) -> Path:
        """The file of a finished shard.

        Raises:
            StoreError: it is gone.
        """
        for path in self._places(name):
            if path.exists():
                return path
        raise StoreError(f"{self.folder / name} vanished while the store was finished. Pack again.")

    def complete(self, final_names: dict[str, str]) -> None:
        """Say that all shards are done, and what each is called in the store; from here on a former store goes."""
        write_json(self.destination / MOVING_NAME, final_names)

    def move_into_place(self, final_names: dict[str, str]) -> None:
        """Replace what was in the store's folder by the new shards.

        Whoever else does the same at the same time finds some of them moved already.

        Raises:
            StoreError: a shard is in neither place.
        """
        for path in self.destination.glob("shard-*.h5"):
            if path.name not in final_names.values():
                path.unlink(missing_ok=True)
        for name, final in final_names.items():
            try:
                os.replace(self.folder / name, self.destination / final)
            except FileNotFoundError as error:
                if not (self.destination / final).exists():
                    raise StoreError(
                        f"{self.folder / name} vanished while the store was finished. Pack again."
                    ) from error

    def is_ending(self) -> bool:
        """Whether some process is making the store of the shards."""
        return (self.destination / MOVING_NAME).exists()


def read_changes(path: Path) -> list[tuple[str, str]]:
    """Key and reason of every image that ``changes.tsv`` lists.

    Raises:
        FileNotFoundError: no image was changed, or the store was packed before such lists were kept.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(json.loads(key), reason) for key, _, reason in (line.partition("\t") for line in lines)]
