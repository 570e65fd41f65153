"""Which pictures of a folder do not belong there, and which captions do not fit: exact likelihoods as a data cleaner.

    python examples/find_outliers.py SUSPECTS --reference GOOD --checkpoint STORE/RUN --out outliers.csv

SUSPECTS and GOOD are folders of pictures; a text file beside a picture (cat.png, cat.txt) is its caption. A picture is
an outlier if it is far less, or far more, likely than the good ones (a blank page is too likely). `explained` is what
the caption is worth, in nats: near or below zero, it describes another picture.
"""

import argparse
import csv
from pathlib import Path

import torch
from PIL import Image

from starflow.generate import Generator, ImageScore
from starflow.likelihood import Typicality


def scores(generator: Generator, folder: Path) -> dict[str, ImageScore]:
    """The score of each picture, with its caption if it has one."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    captions = [text.read_text().strip() if (text := file.with_suffix(".txt")).exists() else "" for file in files]
    found = generator.score([Image.open(file).convert("RGB") for file in files], captions)
    return dict(zip([file.name for file in files], found, strict=True))


def nats_a_pixel(found: dict[str, ImageScore]) -> torch.Tensor:
    """Log-likelihood without captions, comparable between pictures of different sizes."""
    return torch.tensor([each.nats_without_caption / each.per_token.size for each in found.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suspects", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--checkpoint", required=True, help="STORE/RUN, STORE/RUN@STEP or an exported folder")
    parser.add_argument("--out", type=Path, default=Path("outliers.csv"))
    options = parser.parse_args()

    generator = Generator.open(options.checkpoint)
    usual = Typicality(nats_a_pixel(scores(generator, options.reference)))
    found = scores(generator, options.suspects)
    values = nats_a_pixel(found)
    rows = sorted(zip(usual.p_value(values).tolist(), found.items(), strict=True), key=lambda row: row[0])
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "p_value", "explained_nats", "caption"])
        writer.writerows([name, f"{p:.4g}", f"{each.explained:.2f}", each.caption] for p, (name, each) in rows)
    print(f"{options.out}: {len(rows)} pictures, the strangest first")


if __name__ == "__main__":
    main()
