"""Archives are read where they lie, give what the folders in them would give, and hostile ones are named errors."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from paws_hpc.packing import ImageFolder, PackOptions, Source, SourceConfig, open_source, pack
from paws_hpc.packing.sources.base import SourceChangedError
from paws_hpc.packing.sources.imagefolder import read_labels
from paws_hpc.shards import main
from paws_hpc.store import ImageStore, StoreError
from tests.pictures import encoded, tile
from tests.stores import file_hashes, flip_bit


def jpeg(number: int) -> bytes:
    """A JPEG of a part of a photograph, no two alike."""
    return encoded(tile(7 * number, 5 * number, 50, 40))


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tar_bytes(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for name, content in files.items():
            add(archive, name, content)
    return file.getvalue()


def tar(path: Path, files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, kind))
    return path


def opened(path: Path, kind: str = "tar") -> Source:
    return open_source(SourceConfig(kind, str(path)))


@pytest.fixture
def images() -> dict[str, bytes]:
    """Twelve images of three classes, by their path in a folder."""
    return {f"n{number % 3:08d}/n{number % 3:08d}_{number}.JPEG": jpeg(number) for number in range(12)}


@pytest.fixture
def folder(images: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in images.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path / "folder"


def of_class(images: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key.split("/")[1]: content for key, content in images.items() if key.startswith(name)}


def imagenets(images: dict[str, bytes], path: Path) -> Path:
    """As ILSVRC2012_img_train.tar: an archive of one archive for each class."""
    names = sorted({key.split("/")[0] for key in images})
    return tar(path / "train.tar", {f"{name}.tar": tar_bytes(of_class(images, name)) for name in names})


def beside(images: dict[str, bytes], path: Path) -> Path:
    for name in {key.split("/")[0] for key in images}:
        tar(path / f"{name}.tar", of_class(images, name))
    return path


def class_folders(images: dict[str, bytes], path: Path) -> Path:
    long = {f"./data/train/{name}": content for name, content in images.items()}
    return tar(path / "all.tar", long | {"./data/train/readme.txt": b"no image"}, tarfile.GNU_FORMAT)


def divided(images: dict[str, bytes], path: Path) -> Path:
    """Several archives with class folders; a class may be in both."""
    names = list(images)
    for part in range(2):
        tar(path / f"part-{part}.tar", {f"x/{name}": images[name] for name in names[part::2]})
    return path


@pytest.mark.parametrize("layout", [imagenets, beside, class_folders, divided])
def test_archives_give_the_store_that_their_folder_gives(
    layout: Callable[[dict[str, bytes], Path], Path], images: dict[str, bytes], folder: Path, tmp_path: Path
) -> None:
    root = layout(images, tmp_path / "tars")
    before = sorted(path.name for path in (tmp_path / "tars").rglob("*"))
    packed = pack(opened(root), tmp_path / "a", options=PackOptions(shard_bytes=8000, workers=1))
    expected = pack(ImageFolder(folder), tmp_path / "b", options=PackOptions(shard_bytes=8000, workers=1))
    assert len(packed.manifest.shards) > 1
    assert packed.manifest.digest == expected.manifest.digest  # keys, labels, classes and bytes, in order
    assert packed.manifest.origin.digest == expected.manifest.origin.digest
    assert sorted(path.name for path in (tmp_path / "tars").rglob("*")) == before  # nothing was unpacked


def test_long_and_unicode_names_survive_in_every_tar_format(tmp_path: Path) -> None:
    names = {"ähnlich/" + "sehr lang " * 20 + ".jpg": jpeg(1), "b/" + "日本" * 60 + ".jpg": jpeg(2)}
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        source = opened(tar(tmp_path / f"{kind}.tar", names, kind))
        assert sorted(source.keys) == sorted(names)
        assert [source.load(place) for place in range(2)] == [names[key] for key in source.keys]


def test_a_list_names_the_classes_of_a_flat_archive(images: dict[str, bytes], tmp_path: Path) -> None:
    flat = {key.split("/")[1]: content for key, content in images.items()}
    root, labels, to = str(tar(tmp_path / "val.tar", flat)), tmp_path / "labels.csv", str(tmp_path / "store")
    with pytest.raises(StoreError, match=r"is in no class folder.*--labels FILE"):
        opened(Path(root))
    lines = [f"{Path(name).stem},{name.split('_')[0]} 85 1 499 272" for name in flat]  # as Kaggle's solution file
    labels.write_text("ImageId,PredictionString\n" + "\n".join(lines))
    assert main(["pack", "tar", "--root", root, "--labels", str(labels), "--to", to]) == 0
    store = ImageStore(Path(to))
    assert (sorted(store.keys), store.classes) == (sorted(flat), ("n00000000", "n00000001", "n00000002"))
    assert [store.classes[label] for label in store.labels] == [key.split("_")[0] for key in store.keys]
    shard, before = Path(to) / store.manifest.shards[0].name, file_hashes(Path(to))
    flip_bit(shard)
    assert main(["repair", to, "--root", root, "--labels", str(labels)]) == 0
    assert file_hashes(Path(to)) == before


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_lists_are_read_as_spreadsheets_save_them(tmp_path: Path, separator: str) -> None:
    path, rows = tmp_path / "labels.csv", [("file", "label"), ("a.jpg", "great white shark"), ("b.jpg", '"1, or 2; 3"')]
    path.write_text("".join(f"{separator.join(row)}\n" for row in rows))
    assert read_labels(path) == {"file": "label", "a.jpg": "great white shark", "b.jpg": "1, or 2; 3"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,cat", "has no line for image 'b.jpg'"),
        ("a,cat\nb", r"line 2: 'b' is not '<image>,<class>'"),
        ("a,cat\nb.jpg dog\na,dog", r"line 3: 'a' is 'dog', but 'cat' before"),
        ("a.jpg cat\nb.jpg great white shark", r"line 2: 'b.jpg great white shark' .*comma where a name has blanks"),
        ("\udcff", r"cannot be read.*'<image>,<class>'"),
    ],
)
def test_a_list_of_labels_that_makes_no_sense_is_named(tmp_path: Path, text: str, message: str) -> None:
    root, labels = tar(tmp_path / "a.tar", {"a.jpg": b"x", "b.jpg": b"y"}), tmp_path / "labels.csv"
    labels.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(StoreError, match=rf"labels.csv.*{message}"):
        open_source(SourceConfig("tar", str(root), labels=str(labels)))


def webdataset(path: Path, *, as_json: bool = False) -> Path:
    for part in range(2):
        files: dict[str, bytes] = {}
        for number in range(part, 8, 2):
            label = {"label": number % 3, "caption": "x"}
            files[f"{number:06d}.jpg"] = jpeg(number)
            files[f"{number:06d}.{'json' if as_json else 'cls'}"] = (
                json.dumps(label).encode() if as_json else str(number % 3).encode()
            )
        tar(path / f"shard-{part}.tar", files)
    return path


@pytest.mark.parametrize("as_json", [False, True])
def test_webdataset_samples_are_images_with_their_labels(tmp_path: Path, as_json: bool) -> None:
    report = pack(opened(webdataset(tmp_path / "wds", as_json=as_json), "webdataset"), tmp_path / "s")
    store = ImageStore(report.path)
    assert (len(store), store.classes) == (8, ("0", "1", "2"))
    for key, label, content in zip(store.keys, store.labels, store.read_encoded(range(8)), strict=True):
        assert (content, label) == (jpeg(int(key[:6])), int(key[:6]) % 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"x"}, r"sample 'a' has neither .cls nor .json"),
        ({"a.cls": b"1"}, r"sample 'a' has 0 images"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, r"sample 'a' has 2 images"),
        ({"a.jpg": b"x", "a.json": b"{}"}, r"no label in the field 'label'.*--label-field"),
        ({"a.jpg": b"x", "a.json": b"[" * 100_000}, r"no label in the field 'label'"),
        ({"a.jpg": b"x", "a.json": b'{"label": 1.5}'}, r"has the label 1.5"),
        ({"a.jpg": b"x", "a.json": b" " * (2 << 20)}, r"label file of 2,097,152 bytes"),
        ({"a.jpg": b"x", "a.cls": b"7"}, r"labels from 7 to 7 on 1 images"),
        (
            {"a.jpg": b"x", "a.cls": b"0", "b.jpg": b"y", "b.cls": b"dog"},
            r"labels that are numbers and labels that are",
        ),
    ],
)
def test_webdataset_samples_that_make_no_sense_are_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        opened(tar(tmp_path / "a.tar", files), "webdataset")


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(size: int, text: bytes) -> bytes:
    """An extended header that says ``text`` of the file behind it."""
    return header("x", size, tarfile.XHDTYPE) + text.ljust(512, b"\0") + header("a/b.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("../../etc/a.jpg"), r"'../../etc/a.jpg' leads out of the archive"),
        (header("cat/../../a.jpg"), r"leads out of the archive"),
        (header("/etc/a.jpg"), r"'/etc/a.jpg' leads out of the archive"),
        (header("cat/a.jpg", kind=tarfile.SYMTYPE), r"'cat/a.jpg' is a symbolic link"),
        (header("cat/a.jpg", kind=tarfile.LNKTYPE), r"'cat/a.jpg' is a hard link"),
        (header("cat/a.jpg", kind=tarfile.FIFOTYPE), r"is a named pipe"),
        (header("cat/a.jpg", kind=tarfile.CHRTYPE), r"is a device"),
        (header("cat/a.jpg", kind=tarfile.GNUTYPE_SPARSE), r"is a sparse file"),
        (header("cat/a.jpg", kind=b"?"), r"of unknown type"),
        (header("a/x.jpg", 1 << 62), r"'a/x.jpg' has 4,611,686,018,427,387,904 bytes, 1,536 are left"),
        (header("x", 1 << 40, tarfile.GNUTYPE_LONGNAME), r"a name or header of 1,099,511,627,776 bytes"),
        (header("x", 1 << 40, tarfile.XHDTYPE), r"a name or header of"),
        (header("x", 3000, tarfile.XHDTYPE) + bytes(100), r"cut off"),
        (pax(20, b"99999 path=a"), r"cannot be read"),
        (pax(9, b"0 path=a\n"), r"cannot be read"),
        (pax(28, b"28 size=9999999999999999999\n"), r"'a/b.jpg' has 9,999,999,999,999,999,999 bytes"),
        (pax(20, b"20 GNU.sparse.map=1\n"), r"sparse"),
    ],
)
def test_hostile_members_and_headers_that_lie_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "lies.tar"
    path.write_bytes(content + bytes(1536))
    with pytest.raises(StoreError, match=rf"lies.tar.*{message}"):
        opened(path)


def test_a_cut_or_damaged_archive_is_named_wherever_the_fault_is(images: dict[str, bytes], tmp_path: Path) -> None:
    """The standard library takes a damaged header for the end; every image behind it would be missing."""
    path = imagenets(images, tmp_path)
    whole = path.read_bytes()
    faults = 0
    for stop in range(0, len(whole) - 10_240, 1511):
        path.write_bytes(whole[:stop])
        with pytest.raises(StoreError, match=r"cut off|not a tar"):
            opened(path)
        faults += 1
    assert faults > 10
    second = whole.index(b"n00000001.tar")
    path.write_bytes(whole[:second] + b"X" + whole[second + 1 :])
    with pytest.raises(StoreError, match=rf"damaged: byte {second:,} is not a header"):
        opened(path)


@pytest.mark.parametrize("inner", [False, True])
def test_bytes_behind_the_end_marker_are_named(images: dict[str, bytes], tmp_path: Path, inner: bool) -> None:
    """Archives that were joined by cat: every image of the second would be missing."""
    first, second = (tar_bytes({f"n0/{name}.jpg": jpeg(0)}) for name in "ab")
    joined = tar(tmp_path / "joined.tar", {"n0.tar": first + second}) if inner else tmp_path / "joined.tar"
    if not inner:
        joined.write_bytes(first + second)
    at = joined.read_bytes().index(second)
    with pytest.raises(StoreError, match=rf"joined.tar.* {len(second):,} bytes behind it, from byte {at:,} on"):
        opened(joined)
    joined.write_bytes(first + bytes(3 << 20))  # as padded by tapes
    assert len(opened(joined).keys) == 1


def test_images_that_occur_twice_are_named_with_their_archives(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / "tars" / name, {"cat/x.jpg": jpeg(0), f"dog/{name}.jpg": jpeg(1)})
    with pytest.raises(StoreError, match=r"'cat/x.jpg' occurs twice in a.tar and b.tar"):
        opened(tmp_path / "tars")
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        add(archive, "cat/x.jpg", jpeg(0))
        add(archive, "cat/x.jpg", jpeg(1))
    with pytest.raises(StoreError, match=r"'cat/x.jpg' occurs twice in one.tar"):
        opened(tmp_path / "one.tar")


def test_compressed_archives_and_other_files_are_named(images: dict[str, bytes], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        add(archive, "cat/x.jpg", jpeg(0))
    with pytest.raises(StoreError, match=r"a.tar is not a tar archive.*decompress it first"):
        opened(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(jpeg(0) * 9)
    with pytest.raises(StoreError, match=r"b.tar is not a tar archive"):
        opened(tmp_path / "b.tar")
    with pytest.raises(StoreError, match="neither a tar archive nor a folder"):
        opened(tmp_path / "absent")
    deep = tar_bytes({"b.tar": tar_bytes({"c.jpg": b"x"})})
    with pytest.raises(StoreError, match="two levels deep"):
        opened(tar(tmp_path / "deep.tar", {"a.tar": deep}))


def test_an_archive_that_changes_while_it_is_packed_is_noticed(images: dict[str, bytes], tmp_path: Path) -> None:
    path = class_folders(images, tmp_path)
    source = opened(path)
    shutil.copyfile(path, tmp_path / "again.tar")
    (tmp_path / "again.tar").replace(path)
    with pytest.raises(SourceChangedError, match=r"all.tar changed since the source was listed"):
        pack(source, tmp_path / "store", options=PackOptions(on_error="skip", workers=1))
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_an_unreadable_image_in_an_archive_is_named_by_its_path(images: dict[str, bytes], tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", images | {"n00000001/bad.JPEG": b"", "n00000002/._ghost.JPEG": b"resource fork"})
    report = pack(opened(path), tmp_path / "store", options=PackOptions(on_error="skip"))
    assert [(omission.key, omission.reason) for omission in report.manifest.skipped] == [
        ("n00000001/bad.JPEG", "it is empty")
    ]
    assert np.array_equal(report.manifest.class_counts, [4, 4, 4])
