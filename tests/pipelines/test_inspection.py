"""Pictures are decoded completely, hashed and measured."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from pipelines.inspection import InspectionError, inspect_image, perceptual_hash
from tests.pipelines.hostile_web import picture, pixels


def look(data: bytes) -> object:
    return inspect_image(data, 2**20, 10)


def distance(a: int, b: int) -> int:
    return ((a ^ b) & (2**64 - 1)).bit_count()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_hash_survives_formats_and_sizes(kind: str) -> None:
    original = inspect_image(picture("PNG"), 2**20, 10)
    assert distance(inspect_image(picture(kind), 2**20, 10).phash, original.phash) <= 6
    file = io.BytesIO()
    Image.fromarray(pixels(0)).resize((200, 150)).save(file, kind)
    assert distance(inspect_image(file.getvalue(), 2**20, 10).phash, original.phash) <= 6


def test_the_hash_tells_pictures_apart() -> None:
    hashes = [inspect_image(picture(seed=seed), 2**20, 10).phash for seed in range(20)]
    assert min(distance(a, b) for a in hashes for b in hashes if a != b) > 10
    assert len(set(hashes)) == 20


def test_the_hash_has_half_its_bits_set() -> None:
    grey = np.random.default_rng(0).random((32, 32), dtype=np.float32) * 255
    assert 30 <= distance(perceptual_hash(grey), 0) <= 34


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_undone_before_hashing(orientation: int) -> None:
    turned = {1: 0, 3: 180, 6: 90, 8: 270}[orientation]  # stored turned counter-clockwise, shown upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels(0)).rotate(turned, expand=True).save(file, "JPEG", exif=exif, quality=95)
    seen = inspect_image(file.getvalue(), 2**20, 10)
    assert (seen.width, seen.height) == (64, 48)
    assert distance(seen.phash, inspect_image(picture("PNG"), 2**20, 10).phash) <= 6


def test_spread_is_zero_for_a_single_colour_and_for_nothing_on_white() -> None:
    for mode, colour in (("RGB", (9, 99, 200)), ("RGBA", (255, 0, 0, 0))):
        file = io.BytesIO()
        Image.new(mode, (50, 50), colour).save(file, "PNG")
        assert inspect_image(file.getvalue(), 2**20, 10).spread == 0
    assert inspect_image(picture(), 2**20, 10).spread > 20


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_cut_files_are_found(kind: str) -> None:
    data = picture(kind)
    with pytest.raises(InspectionError, match=r"corrupt|not_an_image"):
        look(data[: len(data) * 2 // 3])


def test_what_the_avif_decoder_raises_is_a_corrupt_picture() -> None:
    still, moving = picture("AVIF"), picture("AVIF", save_all=True, append_images=[Image.fromarray(pixels(1))])
    pixels_at, timescale_at = still.index(b"mdat") + 4, moving.index(b"mdhd") + 24
    for data in (
        still[:pixels_at] + bytes(len(still) - pixels_at),
        moving[:timescale_at] + bytes(4) + moving[timescale_at + 4 :],
    ):
        with pytest.raises(InspectionError, match="corrupt"):
            look(data)


def test_frames_and_pixels_are_bounded() -> None:
    frames = [Image.fromarray(pixels(seed, 12, 16)) for seed in range(12)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        assert inspect_image(file.getvalue(), 2**20, 12).width == 16
        with pytest.raises(InspectionError, match="too_many_frames"):
            inspect_image(file.getvalue(), 2**20, 11)
    with pytest.raises(InspectionError, match="too_many_pixels"):
        inspect_image(picture(), 64 * 48 - 1, 10)


def test_of_a_tiff_no_more_pages_are_looked_at_than_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's count of pages takes a time that is quadratic in them: hours for 20 MB of small ones."""
    load, loaded = TiffImagePlugin.ImageFileDirectory_v2.load, []
    monkeypatch.setattr(
        TiffImagePlugin.ImageFileDirectory_v2, "load", lambda self, file: (loaded.append(1), load(self, file))
    )
    page, file = Image.new("L", (1, 1)), io.BytesIO()
    page.save(file, "TIFF", save_all=True, append_images=[page] * 99)
    with pytest.raises(InspectionError, match="too_many_frames"):
        look(file.getvalue())
    assert len(loaded) < 20
