"""Draw a picture for a prompt, then change a part of it: the two things a checkpoint is most often wanted for.

    python examples/sample_and_inpaint.py STORE/RUN "a red apple" "a green apple" --out pictures

Writes sample.png for the first prompt, and inpainted.png: the middle of it drawn again for the second prompt, each
proposal weighed by its exact likelihood against the rest of the picture.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from starflow.generate import Generator


def middle(size: tuple[int, int]) -> Image.Image:
    """A mask that is white, so to be filled, in the middle half."""
    mask = Image.new("L", size, 0)
    width, height = size
    ImageDraw.Draw(mask).rectangle((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="STORE/RUN, STORE/RUN@STEP or an exported folder")
    parser.add_argument("prompt")
    parser.add_argument("change")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=8, help="proposals for the hole; more is better and slower")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    generator = Generator.open(options.checkpoint)
    (picture,) = generator.sample([options.prompt], guidance=options.guidance)
    picture.save(options.out / "sample.png")
    changed = generator.inpaint(picture, middle(picture.size), options.change, rounds=options.rounds)
    changed.save(options.out / "inpainted.png")
    print(f"{options.out}: sample.png, inpainted.png")


if __name__ == "__main__":
    main()
