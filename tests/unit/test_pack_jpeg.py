"""What packing does to an image: nothing that changes pixels where that can be avoided, and everything is said."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence

from paws_hpc.packing import ImageFolder, PackOptions, SourceConfig, open_source, pack
from paws_hpc.packing.jpeg import exif_orientation, take_apart
from paws_hpc.packing.standard import ImagePolicy, StandardImage, standard_image, standard_pixels, transcoder
from paws_hpc.store import ImageStore, StoreError
from paws_hpc.store.decode import decode_jpeg, decode_record
from paws_hpc.store.format import (
    FLAG_GREY,
    FLAG_MADE_BASELINE,
    FLAG_PIXELS,
    FLAG_PNG,
    FLAG_RECOVERED,
    FLAG_REENCODED,
    FLAG_SHRUNK,
    FLAG_STRIPPED,
    FLAG_TURNED,
)
from tests import pictures
from tests.pictures import encoded
from tests.stores import noise

needs_turbojpeg = pytest.mark.skipif(transcoder() is None, reason="turbojpeg is not installed")


def tile(width: int = 160, height: int = 112) -> Image.Image:
    return pictures.tile(100, 80, width, height)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = orientation, "a private description"
    return tags


def pixels_of(image: StandardImage) -> NDArray[np.uint8]:
    pixels = decode_record(image.payload, flags=image.flags, size=(image.height, image.width))
    if image.pixels is not None:
        assert np.array_equal(pixels, image.pixels)
    return pixels


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_metadata_goes_and_every_pixel_stays(subsampling: int) -> None:
    content = encoded(
        tile(), quality=90, subsampling=subsampling, exif=exif(1), comment=b"secret", icc_profile=b"a profile" * 99
    )
    image = standard_image(content + b"another image behind it")
    assert (image.flags, image.changed) == (FLAG_STRIPPED, "metadata taken out")
    assert np.array_equal(pixels_of(image), decode_jpeg(content))
    for trace in (b"Exif", b"secret", b"profile", b"private", b"behind"):
        assert trace not in image.payload
    plain = encoded(tile(), quality=90, subsampling=subsampling)
    assert standard_image(plain).payload == plain
    assert standard_image(plain).changed is None
    assert standard_image(image.payload).payload == image.payload


def test_a_preview_in_the_header_goes() -> None:
    plain = encoded(tile())
    assert plain[4:11] == b"\0\x10JFIF\0"
    preview = plain[:4] + struct.pack(">H", 16 + 3 * 4) + plain[6:18] + b"\2\2" + b"\x7f" * 12 + plain[20:]
    assert np.array_equal(decode_jpeg(preview), decode_jpeg(plain))
    assert standard_image(preview).payload == plain


def test_adobes_colours_stay_what_they_are() -> None:
    """JPEGs whose components are RGB say so in Adobe's segment only: without it they would turn green and pink."""
    content = encoded(tile(), quality=95, keep_rgb=True)
    frame, scan = content.index(b"\xff\xc0"), content.index(b"\xff\xda")
    named = bytearray(content)  # components called R, G and B say it, too: call them 1, 2 and 3
    for number in range(3):
        named[frame + 10 + 3 * number] = named[scan + 5 + 2 * number] = number + 1
    content = bytes(named)
    assert b"Adobe" in content
    image = standard_image(content + b"x")
    assert image.flags == FLAG_STRIPPED
    assert np.array_equal(pixels_of(image), decode_jpeg(content))
    assert np.abs(pixels_of(image).astype(int) - np.asarray(tile())).mean() < 3


@needs_turbojpeg
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_progressive_jpegs_become_baseline_without_loss(subsampling: int) -> None:
    content = encoded(tile(97, 61), quality=90, subsampling=subsampling, progressive=True)
    image = standard_image(content, ImagePolicy(transcode=True))
    assert (image.flags, image.changed) == (FLAG_MADE_BASELINE, "progressive made baseline")
    assert not take_apart(image.payload).progressive
    assert np.array_equal(pixels_of(image), decode_jpeg(content))


def test_transcoding_is_a_choice_that_the_manifest_names_and_needs_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.jpg").write_bytes(encoded(tile(), progressive=True))
    report = pack(ImageFolder(tmp_path / "images"), tmp_path / "store")
    assert (report.progressive, report.manifest.packing.transcoder) == (1, None)
    if transcoder() is not None:
        with pytest.raises(StoreError, match=r"transcoder=None \(wanted 'turbojpeg"):
            pack(ImageFolder(tmp_path / "images"), tmp_path / "store", options=PackOptions(transcode=True))
        forced = pack(
            ImageFolder(tmp_path / "images"), tmp_path / "store", options=PackOptions(transcode=True, force=True)
        )
        assert (forced.progressive, forced.manifest.packing.transcoder) == (0, transcoder())
        assert not pack(ImageFolder(tmp_path / "images"), tmp_path / "store").packed  # holds the same images
    monkeypatch.setattr("paws_hpc.packing.plan.transcoder", lambda: None)
    with pytest.raises(ValueError, match=r"pack.transcode=true needs turbojpeg.*paws-hpc\[transcode\]"):
        PackOptions(transcode=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("lossless", [False, pytest.param(True, marks=needs_turbojpeg)])
def test_images_are_stored_as_viewers_show_them(orientation: int, lossless: bool) -> None:
    for width, height in ((160, 112), (61, 47)):
        content = encoded(tile(width, height), quality=95, exif=exif(orientation))
        with Image.open(io.BytesIO(content)) as opened:
            shown = np.asarray(ImageOps.exif_transpose(opened)).astype(int)
        image = standard_image(content, ImagePolicy(transcode=lossless))
        assert np.abs(pixels_of(image) - shown).mean() < 2
        assert bool(image.flags & FLAG_TURNED) == (orientation != 1)
        whole_blocks = width == 160
        assert bool(image.flags & FLAG_REENCODED) <= (orientation != 1 and not (lossless and whole_blocks))
        assert take_apart(image.payload).orientation == 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight_over_the_full_scale_and_counted(kind: str) -> None:
    every = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16).reshape(256, 256)
    image = standard_image(encoded(Image.fromarray(every), kind))
    assert np.array_equal(pixels_of(image)[..., 1], np.rint(every / 257))
    assert (image.flags, image.changed) == (FLAG_PIXELS | FLAG_GREY | FLAG_REENCODED, f"16-bit {kind}")


def test_colour_that_eight_bits_of_rgb_cannot_hold_is_counted_as_a_loss() -> None:
    """PIL itself cuts 16 bits of colour to their high bytes, and says nothing of it."""
    tags = [(256, 2), (257, 2), (259, 1), (262, 2), (273, 134), (277, 3), (278, 2), (279, 24)]
    entries = sorted([*((tag, 3, 1, value) for tag, value in tags), (258, 3, 3, 128)])
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    tiff = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)
    sixteen, pixels = (16, 16, 16), bytes(range(24))
    tiff = tiff.ljust(128, b"\0") + struct.pack("<3H", *sixteen) + pixels
    row = b"\0" + bytes(range(12))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row + row)) + chunk(b"IEND", b"")
    cmyk = encoded(tile(20, 30).convert("CMYK"), "TIFF")
    files = {"16-bit TIFF": tiff, "16-bit PNG": png, "16-bit PPM": b"P6 2 2 65535\n" + pixels, "CMYK TIFF": cmyk}
    for changed, content in files.items():
        image = standard_image(content)
        assert image.changed == changed
        assert image.flags & FLAG_REENCODED
    assert not standard_image(b"P6 2 2 255\n" + pixels[:12]).flags & FLAG_REENCODED


@pytest.mark.parametrize("size", [(65_400, 1), (2, 2_001)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_too_narrow_to_be_cropped_is_not_packed(size: tuple[int, int], kind: str) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels, too narrow"):
        standard_image(encoded(Image.new("RGB", size), kind))


def test_a_misnamed_animation_gives_its_first_frame() -> None:
    frames = [tile(40, 30), ImageOps.invert(tile(40, 30))]
    for kind in ("GIF", "WEBP", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with Image.open(io.BytesIO(content)) as opened:
            assert len(list(ImageSequence.Iterator(opened))) == 2
        image = standard_image(content)
        assert image.changed == kind
        assert bool(image.flags & FLAG_REENCODED) == (kind == "WEBP")  # which PIL writes at some loss
        assert np.abs(pixels_of(image).astype(int) - np.asarray(frames[0])).mean() < 12  # a GIF has 256 colours


def test_large_images_are_shrunk_only_when_asked_to() -> None:
    content = encoded(tile(200, 150), quality=95)
    assert standard_image(content).payload == content
    assert standard_image(content, ImagePolicy(max_short_side=150)).payload == content
    image = standard_image(content, ImagePolicy(max_short_side=75))
    assert (image.height, image.width) == (75, 100)
    assert (image.flags, image.changed) == (FLAG_SHRUNK | FLAG_REENCODED, "shrunk to a short side of 75")
    smaller = np.asarray(tile(200, 150).resize((100, 75), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pixels_of(image) - smaller).mean() < 5
    thin = standard_image(encoded(tile(300, 2), "PNG"), ImagePolicy(max_short_side=1))
    assert (thin.height, thin.width) == (1, 150)


@pytest.mark.parametrize("wanted", [True, False])
def test_damage_is_found_whether_or_not_pixels_are_wanted(wanted: bool) -> None:
    content = encoded(tile(), quality=90)
    assert (standard_image(content, ImagePolicy(pixels=wanted)).pixels is not None) == wanted
    image = standard_image(content[:-700] + content[-2:], ImagePolicy(pixels=wanted))
    assert image.changed is not None
    assert image.changed.startswith("JPEG with faults")
    assert image.flags == FLAG_RECOVERED | FLAG_REENCODED
    assert np.abs(pixels_of(image)[:32].astype(int) - decode_jpeg(content)[:32]).mean() < 2.5
    with pytest.raises(ValueError, match="it is not a readable image"):
        standard_image(content[:700], ImagePolicy(pixels=wanted))


@pytest.mark.parametrize("wanted", [True, False])
def test_absurd_sizes_are_refused_before_memory_is_taken(wanted: bool) -> None:
    content = encoded(tile(16, 16))
    frame = content.index(b"\xff\xc0")
    huge = content[: frame + 5] + struct.pack(">HH", 65_500, 65_500) + content[frame + 9 :]
    with pytest.raises(ValueError, match=r"65500 x 65500|4290250000"):
        standard_image(huge, ImagePolicy(pixels=wanted))
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    assert len(bomb) < 200_000
    with pytest.raises(ValueError, match=r"200000000|20000 x 10000"):
        standard_image(bomb, ImagePolicy(pixels=wanted))
    with pytest.raises(ValueError, match="70000 x 1 pixels"):
        standard_image(encoded(Image.new("RGB", (70_000, 1)), "PNG"), ImagePolicy(pixels=wanted))


def test_formats_that_no_data_set_has_are_not_even_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL would start Ghostscript on an EPS file, whatever its name, and wait for it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for kind in ("EPS", "DDS", "TGA", "ICO", "PDF"):
        with pytest.raises(ValueError, match="it is not a readable image"):
            standard_image(encoded(tile(16, 16), kind))
    assert not (tmp_path / "started").exists()


def test_a_file_made_to_keep_decoders_busy_is_refused() -> None:
    content = encoded(tile(16, 16), progressive=True)
    last = content.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="more than 500 scans"):
        standard_image(content[:last] + content[last:-2] * 600 + b"\xff\xd9")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_image_or_a_value_error_and_nothing_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]))
    content = bytearray(encoded(tile(24, 17), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content
    try:
        image = standard_image(bytes(content))
    except ValueError:
        return
    pixels_of(image)
    if not image.flags & (FLAG_PIXELS | FLAG_PNG):
        assert simplejpeg.decode_jpeg_header(image.payload)[2] in ("YCbCr", "RGB", "Gray")


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0"]))
def test_any_exif_bytes_give_an_orientation(noise: bytes, start: bytes) -> None:
    assert exif_orientation(start + noise) in range(1, 9)


def test_a_file_has_the_pixels_that_it_would_have_in_a_store(tmp_path: Path) -> None:
    gradient = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8)
    pixels = np.stack((gradient, 255 - gradient, gradient // 2), axis=2)
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels).save(folder / "b.jpg", quality=60)
    Image.fromarray(pixels).save(folder / "c.jpg", exif=exif(6))
    Image.fromarray(gradient).save(folder / "d.jpg", progressive=True)
    for side, encoding in ((None, "lossless"), (20, "lossless"), (None, "jpeg")):
        place = tmp_path / f"store-{side}-{encoding}"
        pack(
            open_source(SourceConfig(kind="folder", root=str(tmp_path / "images"))),
            place,
            options=PackOptions(max_short_side=side, encoding=encoding),
        )
        store = ImageStore(place)
        for key, packed in zip(store.keys, store.images(range(len(store))), strict=True):
            content = (tmp_path / "images" / key).read_bytes()
            assert np.array_equal(standard_pixels(content, store.manifest), packed), key
    raw = pack(noise(1, (40, 50, 3)), tmp_path / "raw").manifest
    assert raw is not None
    assert np.array_equal(standard_pixels((folder / "a.png").read_bytes(), raw), pixels), "without loss"
