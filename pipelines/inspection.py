"""What is learned of a picture when it is fetched: size, frames, a perceptual hash, and how blank it is."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from starflow.images import DECODE_ERRORS, FORMATS, ImageError, to_rgb

#: EXIF orientations that swap width and height (EXIF 2.3, tag 0x0112).
_SIDEWAYS = (5, 6, 7, 8)
_SIDE = 32


def _dct_rows() -> np.ndarray:
    """The eight lowest rows of the 32-point DCT-II, shape (8, 32)."""
    points = np.arange(_SIDE)
    return np.cos(np.pi / _SIDE * (points + 0.5) * np.arange(8)[:, None]).astype(np.float32)


_DCT = _dct_rows()


class InspectionError(Exception):
    """Bytes that are no usable picture; the message is the short reason that drops are counted by."""


@dataclass(frozen=True)
class Inspection:
    """File format, upright width and height in pixels, perceptual hash (signed 64 bit), and `spread`, the standard
    deviation of the 32 x 32 grey picture in grey levels: 0 for a single colour."""

    format: str
    width: int
    height: int
    phash: int
    spread: float


def inspect_image(data: bytes, max_pixels: int, max_frames: int) -> Inspection:
    """Decodes `data` completely, so that a cut or corrupt file is found here and not when it is encoded.

    Raises InspectionError: empty, not_an_image, too_many_pixels, too_many_frames, corrupt.
    """
    if not data:
        raise InspectionError("empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise InspectionError("too_many_pixels") from error
    except DECODE_ERRORS as error:
        raise InspectionError("not_an_image") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise InspectionError("too_many_pixels")
        try:
            if _has_more_frames(image, data, max_frames):
                raise InspectionError("too_many_frames")
            if image.getexif().get(0x0112) in _SIDEWAYS:
                width, height = height, width
            grey = _grey(image)
        except (*DECODE_ERRORS, ImageError) as error:
            raise InspectionError("corrupt") from error
    pixels = np.asarray(grey, dtype=np.float32)
    return Inspection((image.format or "").lower(), width, height, perceptual_hash(pixels), float(pixels.std()))


def _grey(image: Image.Image) -> Image.Image:
    """The upright picture in 32 x 32 grey pixels; decodes all of the file."""
    if image.mode == "RGB" and "icc_profile" not in image.info:
        # JPEG decodes straight to grey at an eighth of the size, which is plenty here; other formats ignore this.
        image.draft("L", (4 * _SIDE, 4 * _SIDE))
    image.load()
    if image.mode == "L":
        return ImageOps.exif_transpose(image).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return to_rgb(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)


def perceptual_hash(grey: np.ndarray) -> int:
    """DCT hash of a (32, 32) grey picture: which of its 64 lowest frequencies exceed their median
    (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010), as a signed 64-bit integer.
    """
    low = (_DCT @ grey @ _DCT.T).ravel()
    bits = np.packbits(low > np.median(low[1:]))
    return int(bits.view(">i8")[0])


def _has_more_frames(image: Image.Image, data: bytes, limit: int) -> bool:
    if image.format == "GIF":
        return _gif_frames(data, limit) > limit
    if image.format == "TIFF":
        return _has_page(image, limit)
    return int(getattr(image, "n_frames", 1)) > limit


def _has_page(image: Image.Image, number: int) -> bool:
    """Whether a TIFF has that page, of those from 0; Pillow would count all, comparing each with each before."""
    try:
        image.seek(number)
    except EOFError:
        return False
    finally:
        image.seek(0)
    return True


def _gif_frames(data: bytes, limit: int) -> int:
    """Counts a GIF's frames by its block headers, at most to `limit` + 1; Pillow would decode them."""
    position = 13 + _colour_table(data[10])
    frames = 0
    while frames <= limit and position < len(data):
        marker = data[position]
        if marker == 0x2C:  # image: descriptor, local colour table, code size
            frames += 1
            position += 11 + _colour_table(data[position + 9])
        elif marker == 0x21:  # extension
            position += 2
        else:
            break
        while position < len(data) and data[position]:
            position += data[position] + 1
        position += 1
    return frames


def _colour_table(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
