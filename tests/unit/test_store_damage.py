"""Whatever is cut or flipped in whichever file of a store: reading gives the packed bytes or a named error."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paws_hpc.packing import PackOptions, pack
from paws_hpc.store import ImageStore, RecordError, StoreError, decode_jpeg
from paws_hpc.store.decode import MAX_PIXELS
from paws_hpc.store.shard import ShardFile, read_shard
from paws_hpc.store.verify import verify
from tests.stores import forget_offsets, noise

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def stores(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A JPEG store and a raw one of 12 images, each in some shards."""
    raw = tmp_path_factory.mktemp("damage") / "raw"
    pack(noise(12, (8, 8, 1)), raw, options=PackOptions(shard_bytes=5 * 64))
    return {"jpeg": photo_folder / "store", "raw": raw}


def everything(store: ImageStore) -> dict[str, object]:
    """All that a store says, by a name for it."""
    positions = range(len(store))
    assert store.find(list(store.keys)).tolist() == list(positions)
    return {
        "records": [record.tobytes() for record in store.each(positions)],
        "pixels": [image.tobytes() for image in store.images(positions)],
        "labels": store.labels.tolist(),
        "keys": list(store.keys),
        "sizes": [sizes.tolist() for sizes in store.sizes(positions)],
        "flags": store.flags.tolist(),
        "classes": store.classes,
        "statistics": (store.mean, store.std),
        "digest": store.digest,
    }


def everything_or_error(store: Path | ImageStore) -> dict[str, object] | StoreError:
    try:
        return everything(store if isinstance(store, ImageStore) else ImageStore(store))
    except StoreError as error:
        return error


CHANGES: dict[str, Callable[[bytes, int, int], bytes]] = {
    "flip": lambda whole, at, mask: whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :],
    "overwrite": lambda whole, at, mask: (whole[:at] + bytes([mask]) * 3 * mask + whole[at + 3 * mask :])[: len(whole)],
    "remove": lambda whole, at, mask: whole[:at] + whole[at + mask :],
    "insert": lambda whole, at, mask: whole[:at] + bytes(mask) + whole[at:],
    "cut": lambda whole, at, _: whole[:at],
    "exchange": lambda whole, at, _: whole[at:] + whole[:at],
}
"""Content of a file, place and number from 1 to 255 → the damaged content."""


Damage = tuple[int, str, float, int]
DAMAGES = st.tuples(
    st.integers(0, 11),
    st.sampled_from(["flip", "flip", *CHANGES]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 255),
)


def inflict(damage: Damage, path: Path, pattern: str = "*") -> tuple[str, bool]:
    """Damage one of a store's files; returns its name, and whether that changed it."""
    number, how, place, mask = damage
    files = sorted(file for file in path.glob(pattern) if file.is_file())
    file = files[number % len(files)]
    before = file.read_bytes()
    after = CHANGES[how](before, int(place * len(before)), mask)
    file.write_bytes(after)
    return file.name, after != before


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
@pytest.mark.parametrize("index_is_there", [True, False])
@EXAMPLES
@given(damage=DAMAGES)
def test_a_damaged_store_is_found_by_verification_and_gives_the_packed_images_or_a_named_error(
    stores: dict[str, Path], kind: str, index_is_there: bool, damage: Damage
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(shutil.copytree(stores[kind], Path(folder) / "store"))
        name, changed = inflict(damage, path)
        faults, _ = verify(path, level="full", workers=1)
        if name != "manifest.json":
            assert {fault.shard or "index.bin" for fault in faults} == ({name} if changed else set())
        if not index_is_there:
            (path / "index.bin").unlink()
        got = everything_or_error(path)
        if isinstance(got, StoreError):
            assert changed
            assert str(path) in str(got)  # it names the place
            assert name != "index.bin"  # which is made anew
        else:
            assert got == everything(ImageStore(stores[kind]))
            assert name != "manifest.json" or not faults


def read_damaged(shard: Path, folder: str) -> None:
    """Read a shard with each byte in use beside its records changed, one after the other; in a process of its own."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # HDF5 may be in an endless loop, where Python's handlers do not run
    signal.alarm(120)
    whole, intact = shard.read_bytes(), read_shard(shard)
    assert intact.data_offset is not None
    records = range(intact.data_offset, intact.data_offset + intact.data_bytes)
    damaged = Path(folder) / "damaged.h5"
    for place in range(len(whole)):
        if place not in records and whole[place]:
            damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            try:
                found = read_shard(damaged)
            except StoreError:
                continue
            if found.header != intact.header:
                raise AssertionError(f"byte {place}: {found.header}")


def test_no_byte_of_a_shard_keeps_its_reader_for_ever(stores: dict[str, Path], tmp_path: Path) -> None:
    """Nor changes what the shard says of itself; the manifest covers the index."""
    reading = multiprocessing.get_context("fork").Process(
        target=read_damaged, args=(stores["jpeg"] / "shard-00000.h5", str(tmp_path))
    )
    reading.start()
    reading.join()
    assert reading.exitcode == 0


def test_a_shard_with_strings_of_variable_length_is_refused_unread(stores: dict[str, Path], tmp_path: Path) -> None:
    shard = Path(shutil.copy(stores["raw"] / "shard-00000.h5", tmp_path))
    with h5py.File(shard, "r+") as file:
        file.attrs["packer"] = "0.0.1"
    with pytest.raises(StoreError, match=r"'packer' is a string of variable length"):
        read_shard(shard)


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
@pytest.mark.parametrize("has_offset", [True, False])
@EXAMPLES
@given(damage=DAMAGES)
def test_a_shard_damaged_under_an_open_store_gives_the_packed_images_or_a_named_record(
    stores: dict[str, Path], kind: str, has_offset: bool, damage: Damage
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(shutil.copytree(stores[kind], Path(folder) / "store"))
        if not has_offset:
            forget_offsets(path)
        with ImageStore(path) as store:
            expected = everything(store)
            assert expected == everything(ImageStore(stores[kind]))
            name, _ = inflict(damage, path, "shard*")
            got = everything_or_error(store)
            if isinstance(got, RecordError):
                assert got.shard == name
                assert got.key in expected["keys"]
                assert str(path / name) in str(got)
            else:
                assert got == expected


def test_a_manifest_of_another_pack_is_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    """Sizes and names fit, as those of two shuffles of one raw data set do; with and without the other's index."""
    other = pack(noise(12, (8, 8, 1), seed=1), tmp_path / "other", options=PackOptions(shard_bytes=5 * 64)).path
    path = Path(shutil.copytree(stores["raw"], tmp_path / "store"))
    shutil.copy(other / "manifest.json", path)
    with pytest.raises(StoreError, match=r"shard-00000.h5 holds another index than was packed"):
        ImageStore(path)
    shutil.copy(other / "index.bin", path)
    mixed = ImageStore(path)
    for place in range(12):
        with pytest.raises(RecordError, match="is damaged: its CRC32C differs"):
            mixed.read_raw([place])
    assert {fault.shard for fault in verify(path, level="quick")[0]} == {f"shard-{n:05d}.h5" for n in range(3)}


def claim(width: int, height: int) -> bytes:
    """A JPEG of some hundred bytes whose header claims another size."""
    content = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"no image at all" * 9, "JPEG"),
        (claim(65_500, 65_500), rf"it claims 65500 x 65500 pixels, more than the {MAX_PIXELS:,} that are decoded"),
        (claim(0, 16), "."),
    ],
)
def test_what_is_no_image_or_a_bomb_is_refused_before_memory_is_taken(content: bytes, message: str) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for payload in (content, np.frombuffer(content, np.uint8)):
        with pytest.raises(ValueError, match=message):
            decode_jpeg(payload)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_what_the_system_cannot_read_is_named(stores: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(stores["jpeg"], tmp_path / "jpeg"))
    forget_offsets(path)
    store = ImageStore(path)
    (path / "shard-00000.h5").unlink()  # under the running reader
    with pytest.raises(RecordError, match=r"shard-00000.h5 cannot be read: .*No such file"):
        store.images([0])


def _group(file: h5py.File, elsewhere: Path) -> None:
    del file["index"]
    file["index"] = np.zeros(3)


def _scalar(file: h5py.File, elsewhere: Path) -> None:
    del file["index/width"]
    file["index/width"] = np.uint32(3)


def _text(file: h5py.File, elsewhere: Path) -> None:
    del file["keys/blob"]
    file["keys/blob"] = "a text"


def _short(file: h5py.File, elsewhere: Path) -> None:
    kept = file["index/label"][:-1]
    del file["index/label"]
    file["index/label"] = kept


def _huge(file: h5py.File, elsewhere: Path) -> None:
    del file["index/offset"]
    file.create_dataset("index/offset", (1 << 34,), "<u8", chunks=(1 << 16,), fillvalue=0)


def _huge_chunk(file: h5py.File, elsewhere: Path) -> None:
    kept = file["index/offset"][:]
    del file["index/offset"]
    file.create_dataset("index/offset", data=kept, chunks=(1 << 28,), maxshape=(None,), compression="gzip")


def _shape_of_one(file: h5py.File, elsewhere: Path) -> None:
    file.attrs["shape"] = 3


def _shape_of_two(file: h5py.File, elsewhere: Path) -> None:
    file.attrs["shape"] = [8, 8]


def _endless(file: h5py.File, elsewhere: Path) -> None:
    file.attrs["count"] = np.inf


def _keys(file: h5py.File, elsewhere: Path) -> None:
    file["keys/offset"][1] = 1 << 40


def _external_data(file: h5py.File, elsewhere: Path) -> None:
    size = file["data"].size
    del file["data"]
    file.create_dataset("data", (size,), "u1", external=[(str(elsewhere), 0, size)])


def _virtual_data(file: h5py.File, elsewhere: Path) -> None:
    layout = h5py.VirtualLayout((file["data"].size,), "u1")
    layout[:] = h5py.VirtualSource(elsewhere.with_suffix(".h5"), "secret", (file["data"].size,))
    del file["data"]
    file.create_virtual_dataset("data", layout)


def _link(file: h5py.File, elsewhere: Path) -> None:
    del file["data"]
    file["data"] = h5py.ExternalLink(str(elsewhere.with_suffix(".h5")), "secret")


HOSTILE = {
    _group: "damaged or not a shard",
    _scalar: "index/width is no list of whole numbers",
    _text: "keys/blob is no list of whole numbers",
    _short: "unequal lengths",
    _huge: "index/offset claims to have 137,438,953,472 bytes",
    _huge_chunk: "index/offset claims to have 2,147,483,648 bytes",
    _shape_of_one: "attribute 'shape' is .*3.*, not 3 whole numbers",
    _shape_of_two: "attribute 'shape' is .*not 3 whole numbers",
    _endless: "attribute 'count' is .*inf.*, not 1 whole numbers",
    _keys: "keys/offset does not divide keys/blob",
    _external_data: "data refers to another file",
    _virtual_data: "data refers to another file",
    _link: "data refers to another file",
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_shard_is_refused_by_name_and_reads_no_other_file(
    stores: dict[str, Path], tmp_path: Path, change: Callable[[h5py.File, Path], None]
) -> None:
    path, secret = tmp_path / "shard-00000.h5", tmp_path / "secret"
    shutil.copy(next(stores["raw"].glob("*.h5")), path)
    secret.write_bytes(b"root:x:0:0:" * 1000)
    with h5py.File(secret.with_suffix(".h5"), "w") as file:
        file["secret"] = np.arange(10_000) % 256
    with h5py.File(path, "r+") as file:
        change(file, secret)
    with pytest.raises(StoreError, match=HOSTILE[change]) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)
    with pytest.raises(OSError, match="HDF5 says") if "data" in HOSTILE[change] else nullcontext():
        ShardFile(path, None).read_into(np.empty(10, np.uint8), 0)
