"""Pictures of any kind to plain RGB pixels, and pixels to picture grids. No torch here: crawlers import it."""

from __future__ import annotations

import io
import math
import struct
import textwrap
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps

from starflow.errors import StarflowError

#: What the web serves. A fixed list keeps formats that start other programs (EPS) or are no pictures (PDF) out.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
MAX_PIXELS = 2**26

#: What Pillow's decoders raise on bytes that are not, or not wholly, the picture they claim to be; AVIF's raises
#: RuntimeError, and ZeroDivisionError for an animation whose clock stands still.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    RuntimeError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(StarflowError):
    """Bytes that cannot be used as a picture; the message says why."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, cover: tuple[int, int] | None = None) -> Image.Image:
    """Decodes `data` to an upright 8-bit sRGB picture: first frame, EXIF orientation applied, alpha on white.

    A JPEG may come out at 1/2, 1/4 or 1/8 of its size as long as it still covers (height, width) `cover`: its decoder
    then leaves out high frequencies, which is faster than decoding and scaling them away.

    Raises ImageError for bytes that are no picture, are cut short, have more than `max_pixels` pixels
    (checked before any pixel is decoded) or hold floating-point samples.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"picture of {width} x {height} pixels; the limit is {max_pixels} pixels")
            if cover is not None and image.format == "JPEG":
                _draft(image, *cover)
            image.load()
            return to_rgb(image)
    except DECODE_ERRORS as error:
        raise ImageError(f"{len(data)} bytes cannot be decoded as a picture: {error}") from error


def _draft(image: Image.Image, height: int, width: int) -> None:
    """Has a JPEG decoded at the smallest size that still covers `height` x `width`."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # lies on its side
        height, width = width, height
    scale = max(width / image.width, height / image.height)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` as an upright 8-bit sRGB picture, whatever its mode; transparent parts become white."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.info.keys() & {"icc_profile", "transparency"}:
        return image
    if image.mode == "F":
        raise ImageError("picture with floating-point samples, whose white is unknown; convert it to 8 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        samples = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((samples / 257).round().astype(np.uint8)).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        flat = Image.alpha_composite(white, image).convert("RGB")
    else:
        flat = image.convert("RGB") if image.mode not in ("RGB", "L", "CMYK") else image
    return _to_srgb(flat, profile) if profile else flat.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        converted = None  # a broken profile, or one for another colour space: browsers ignore it too
    result = converted if converted is not None else image.convert("RGB")
    result.info.pop("icc_profile", None)
    return result


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scales `image` to cover `height` x `width` and crops the centre. Returns (height, width, 3) uint8."""
    image = to_rgb(image)
    scaled = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    return np.asarray(scaled, dtype=np.uint8)


def picture_grid(
    images: Sequence[Image.Image | np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    scale: int = 1,
    lines: int = 3,
) -> Image.Image:
    """Pictures of one size (PIL, or (H, W, 3) uint8) in rows of `columns`, each enlarged by `scale`.

    Captions, one a picture, stand below in at most `lines` lines. Raises ValueError for no pictures, pictures
    of different sizes, or another number of captions.
    """
    pictures = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    if not pictures or len({picture.size for picture in pictures}) != 1:
        sizes = sorted({picture.size for picture in pictures})
        raise ValueError(f"a grid needs pictures of one size, got {len(pictures)} of sizes {sizes}")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures; give one each")
    gap, font = 4, ImageFont.load_default(size=11)
    width, height = (side * scale for side in pictures[0].size)
    label = 13 * lines + 2 if captions is not None else 0
    rows = -(-len(pictures) // columns)
    size = (columns * (width + gap) + gap, rows * (height + label + gap) + gap)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for index, picture in enumerate(pictures):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + label + gap)
        grid.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions is not None:
            text = textwrap.fill(captions[index], max(width // 6, 4), max_lines=lines, placeholder="…")
            draw.multiline_text((x, y + height + 1), text, fill="black", font=font, spacing=1)
    return grid
