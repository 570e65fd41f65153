import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from starflow.images import ImageError, decode_image, fit, picture_grid

RED = (200, 30, 40)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(image, colour, tolerance=6):
    return np.abs(np.asarray(image).astype(int) - np.array(colour)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_usual_formats_decode_to_rgb(kind):
    image = decode_image(encoded(Image.new("RGB", (20, 10), RED), kind))
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert near(image, RED)


def test_transparency_becomes_white_in_every_mode():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    grey = Image.new("LA", (4, 4), (0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert near(decode_image(encoded(clear)), (255, 255, 255), 0)
    assert near(decode_image(encoded(half)), (127, 127, 127), 1)
    assert near(decode_image(encoded(grey)), (255, 255, 255), 0)
    assert near(decode_image(encoded(palette, transparency=0)), (255, 255, 255), 0)
    assert near(decode_image(encoded(Image.new("RGB", (4, 4), RED), transparency=RED)), (255, 255, 255), 0)


def test_palette_and_bilevel():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert near(decode_image(encoded(palette)), RED, 0)
    assert near(decode_image(encoded(Image.new("1", (4, 4), 1))), (255, 255, 255), 0)


def test_sixteen_bits_are_scaled_not_clipped():
    samples = np.full((4, 4), 30_000, np.uint16)
    assert near(decode_image(encoded(Image.fromarray(samples))), (117, 117, 117), 0)
    assert near(decode_image(encoded(Image.fromarray(samples), "TIFF")), (117, 117, 117), 0)


def test_cmyk():
    image = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = image.getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


def test_a_large_jpeg_is_decoded_just_large_enough():
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
    picture = coarse.resize((800, 600), Image.Resampling.BICUBIC)
    data = encoded(picture, "JPEG", quality=95)
    for height, width, size in (
        (64, 64, (100, 75)),
        (100, 64, (200, 150)),
        (64, 260, (400, 300)),
        (601, 9, (800, 600)),
    ):
        small = decode_image(data, cover=(height, width))
        assert small.size == size
        error = fit(small, height, width).astype(float) - fit(decode_image(data), height, width)
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 38 or size == (800, 600)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(picture, "JPEG", exif=exif.tobytes()), cover=(140, 64)).size == (150, 200)
    assert decode_image(encoded(picture), cover=(64, 64)).size == (800, 600)


def test_exif_orientation_is_applied_once():
    picture = Image.new("RGB", (20, 10), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = decode_image(encoded(picture, "JPEG", exif=exif.tobytes()))
    assert image.size == (10, 20)
    assert fit(image, 20, 10).shape == (20, 10, 3)
    assert image.getexif().get(0x0112, 1) == 1


def test_icc_profiles_are_converted_and_broken_ones_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, lab, b"no profile"):
        image = decode_image(encoded(Image.new("RGB", (4, 4), RED), icc_profile=profile))
        assert near(image, RED, 2)
        assert "icc_profile" not in image.info


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), "blue")]
    assert near(decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])), RED)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        b"\x89PNG\r\n\x1a\n",
        encoded(Image.effect_noise((64, 64), 50))[:1500],
        b"<svg/>",
        b"%!PS-Adobe-3.0",
    ],
    ids=["empty", "html", "header", "truncated", "svg", "eps"],
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ImageError, match=f"{len(data)} bytes cannot be decoded"):
        decode_image(data)


def test_too_many_pixels_are_refused_before_decoding():
    with pytest.raises(ImageError, match="20 x 10 pixels; the limit is 199"):
        decode_image(encoded(Image.new("RGB", (20, 10))), max_pixels=199)


def test_floating_point_samples_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_fit_scales_and_crops_the_centre():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    pixels = fit(Image.fromarray(wide), 20, 20)
    assert pixels.shape == (20, 20, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, 2:-2].min() > 240
    assert fit(Image.new("RGB", (3, 3), RED), 16, 24).shape == (16, 24, 3)


def test_grid_places_pictures_and_captions():
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (0, 50, 100)]
    plain = picture_grid(pictures, columns=2, scale=2)
    assert plain.size == (2 * 20 + 4, 2 * 20 + 4)
    assert plain.getpixel((4 + 3, 24 + 3)) == (100, 100, 100)
    labelled = picture_grid(pictures, ["a", "a long caption that wraps", "c"], columns=2, scale=2)
    assert labelled.height > plain.height
    with pytest.raises(ValueError, match="2 captions for 3"):
        picture_grid(pictures, ["a", "b"])
    with pytest.raises(ValueError, match="one size"):
        picture_grid([])
