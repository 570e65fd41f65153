"""What fine-tuning a decoder to noisy latents gains on the emoji VAE: PSNR on held-out pictures, and pictures.

    python benchmarks/decoder.py                                 # noise 0.3, as in the paper; a quarter of an hour
    python benchmarks/decoder.py --checkpoint s3://starflow/RUN           # against that flow's score, at its noise

The first form draws the emoji and holds out the drawings that the shipped VAE has not seen either. The second takes the
pictures of the run's snapshot (after `starflow demo` and `starflow up`), holds out what the flow has not seen, and adds
the flow's own denoising step and its samples. Every line decodes the same noisy latents of the same pictures.

Samples have no original to compare with. OpenMoji is drawn in few colours, so their mean distance (RGB, 0 to 255) from
the nearest of its commonest ones says how clean they are.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from train_step import machine, write

from infra.demo.emoji import render, shuffled, write_pictures
from starflow.cache import FileCache
from starflow.console import console
from starflow.decoders import PREFIX, Decoder, decoder_key, load_decoder, read_decoder
from starflow.encoders import VAE, load_vae, to_pixels
from starflow.generate import Generator
from starflow.images import decode_image, fit, picture_grid
from starflow.objectstore import open_store
from starflow.sampling import denoise
from starflow.snapshots import load_snapshot
from training.decoder import DecoderConfig, finetune
from training.decoder_pictures import PictureBatch, SnapshotPictures, encode_pictures
from training.vae import decibels, load_folder, unit

IMAGES = Path(__file__).parent.parent / "docs" / "images"
RESOLUTION = 32
#: Share of the drawings that the shipped VAE was measured on; with the same seed it is the same drawings.
VAE_HELD_OUT = 0.05
SHOWN = 10
#: The commonest colours of so many drawings cover two thirds of all pixels.
PALETTE, PALETTE_DRAWINGS = 48, 600
PROMPTS = (
    "a red heart",
    "grinning face",
    "red apple",
    "flag of France",
    "cat face",
    "evergreen tree",
    "sun",
    "pizza",
    "waving hand, dark skin tone",
    "automobile",
)


class Case(NamedTuple):
    """A line of the table: decodes (clean latents, noisy latents, captions) to pictures."""

    name: str
    decode: Callable[[Tensor, Tensor, Sequence[str]], Tensor]


def fine_tune(options: argparse.Namespace, **settings: Any) -> tuple[Decoder, str]:
    """A finished decoder, and how it was made."""
    config = DecoderConfig(
        name="benchmark",
        steps=options.steps,
        batch_size=32,
        learning_rate=2e-3,
        adversarial_weight=options.adversarial_weight,
        adversarial_start=options.steps // 2,
        discriminator_width=32,
        precision="bfloat16",
        validate_every=250,
        **settings,
    )

    def on_progress(step: int, losses: Any, quality: Any) -> None:
        if quality is not None:
            console.print(f"step {step}/{config.steps}: held out {quality.tuned:.2f} dB", highlight=False)

    began = time.perf_counter()
    decoder = finetune(config, on_progress)
    return decoder, f"{time.perf_counter() - began:.0f} s"


def cases(vae: VAE, tuned: VAE, generator: Generator | None) -> list[Case]:
    """Every line of the table."""
    found = [
        Case("own decoder, no noise", lambda clean, noisy, captions: vae.decode(clean)),
        Case("own decoder", lambda clean, noisy, captions: vae.decode(noisy)),
    ]
    if generator is not None:

        def scored(clean: Tensor, noisy: Tensor, captions: Sequence[str]) -> Tensor:
            text = generator.condition(captions)
            return vae.decode(denoise(generator.model, noisy, text, generator.latent_noise))

        found.append(Case("the flow's score, own decoder", scored))
    return [*found, Case("fine-tuned decoder", lambda clean, noisy, captions: tuned.decode(noisy))]


def measure(found: list[Case], batches: list[PictureBatch], noise: float) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """The table, and the first pictures of each line (originals first)."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, list[Tensor]] = {case.name: [] for case in found}
    seconds = dict.fromkeys(values, 0.0)
    shown = [unit(batches[0].pixels[:SHOWN])]
    for number, batch in enumerate(batches):
        posterior, drawn = (torch.randn(batch.mean.shape, generator=generator) for _ in range(2))
        clean = batch.mean + batch.std * posterior
        for case in found:
            began = time.perf_counter()
            decoded = case.decode(clean, clean + noise * drawn, batch.captions)
            seconds[case.name] += time.perf_counter() - began
            values[case.name].append(decibels(decoded.clamp(-1, 1), unit(batch.pixels)))
            if number == 0:
                shown.append(decoded[:SHOWN])
    plain = torch.cat(values["own decoder"])
    rows = []
    for name, parts in values.items():
        psnr = torch.cat(parts)
        rows.append(
            {
                "decoded by": name,
                "PSNR, dB": f"{psnr.mean():.2f}",
                "gain, dB": f"{(psnr - plain).mean():+.2f}",
                "standard error of the gain": f"{(psnr - plain).std() / len(psnr) ** 0.5:.2f}",
                "better for": f"{100 * (psnr > plain).float().mean():.0f} %",
                "ms a picture": f"{1e3 * seconds[name] / len(psnr):.1f}",
            }
        )
    return rows, shown


def sheet(rows: Sequence[Sequence[Image.Image]], names: Sequence[str], file: Path) -> None:
    """Writes one row of pictures for each name, which stands under its first picture."""
    pictures = [picture for row in rows for picture in row]
    captions = [
        name if column == 0 else "" for row, name in zip(rows, names, strict=True) for column in range(len(row))
    ]
    picture_grid(pictures, captions, columns=len(rows[0]), scale=3, lines=2).save(file, optimize=True)
    console.print(f"wrote {file}")


def images_of(decoded: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(pixels)) for pixels in to_pixels(decoded)]


def palette_distance(pictures: Sequence[Image.Image]) -> float:
    """Mean distance of the pixels from the nearest of OpenMoji's commonest colours."""
    drawings = [fit(decode_image(render(item.code)), RESOLUTION, RESOLUTION) for item in shuffled()[:PALETTE_DRAWINGS]]
    colours, counts = np.unique(np.stack(drawings).reshape(-1, 3), axis=0, return_counts=True)
    palette = torch.from_numpy(colours[np.argsort(-counts)[:PALETTE]]).float()
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).reshape(-1, 3).float()
    return torch.cdist(pixels, palette).min(1).values.mean().item()


def about_of(batches: list[PictureBatch], decoder: Decoder, made: str) -> dict[str, Any]:
    """What the figures were measured with."""
    return machine("cpu") | {
        "held-out pictures": sum(len(batch.pixels) for batch in batches),
        "latent noise": decoder.latent_noise,
        "fine-tuning": f"{decoder.steps} steps of {decoder.config['batch_size']} pictures, {made}",
        "adversarial weight": decoder.config["adversarial_weight"],
    }


def on_drawings(options: argparse.Namespace, folder: Path) -> None:
    """Noise as in the paper, pictures drawn here."""
    images, vae = folder / "pictures", load_vae("emoji")
    write_pictures(images, limit=options.pictures)
    store = open_store(str(folder / "store"))
    shared = {"held_out": VAE_HELD_OUT, "latent_noise": 0.3}
    decoder, made = fine_tune(options, store=store.url, images=images, resolution=RESOLUTION, **shared)
    _, held_out = load_folder(images, RESOLUTION, VAE_HELD_OUT, seed=0)
    batches = [encode_pictures(vae, part, "cpu") for part in held_out.split(64)]
    rows, shown = measure(cases(vae, load_decoder(store, decoder, vae), None), batches, decoder.latent_noise)
    write("decoder-cpu", "Decoding noisy latents", about_of(batches, decoder, made), rows)
    names = ["original", *(row["decoded by"] for row in rows)]
    sheet([images_of(pictures) for pictures in shown], names, IMAGES / "decoder-before-after.png")


def on_a_flow(options: argparse.Namespace, folder: Path) -> None:
    """The noise of a trained flow, and its own samples."""
    generator = Generator.open(options.checkpoint, decoder="none")
    trained = generator.trained
    assert trained is not None, "a checkpoint names what it was trained on"
    store = open_store(options.checkpoint.rpartition("/")[0])
    shared = {"held_out": trained.held_out, "latent_noise": trained.latent_noise, "cache": folder}
    if options.decoder:
        (place, decoder), made = read_decoder(options.decoder), "made before"
    else:
        decoder, made = fine_tune(options, store=store.url, snapshot=trained.snapshot, **shared)
        place = store
    vae = load_vae(trained.vae.name)
    generator.decoder = load_decoder(place, decoder, vae)
    snapshot, cache = load_snapshot(store, trained.snapshot), FileCache(folder / "snapshots")
    batches = SnapshotPictures(store, snapshot, cache, trained.held_out, 32, seed=0).held_out(options.pictures or 512)
    rows, _ = measure(cases(vae, generator.decoder, generator), batches, trained.latent_noise)
    captions = [caption for batch in batches for caption in batch.captions][: options.samples]
    drawn = dict(zip([row["decoded by"] for row in rows[1:]], draw(generator, [*PROMPTS, *captions]), strict=True))
    for row in rows[1:]:
        row["samples off the palette"] = f"{palette_distance(drawn[row['decoded by']]):.2f}"
    about = about_of(batches, decoder, made) | {"samples": len(PROMPTS) + len(captions)}
    write("decoder-flow-cpu", "Decoding noisy latents, beside a flow's score", about, rows)
    sheet([pictures[: len(PROMPTS)] for pictures in drawn.values()], list(drawn), IMAGES / "decoder-samples.png")
    if not options.decoder:  # the store is the user's: sampling from it goes on as before
        store.delete([decoder_key(decoder.name)])
        store.delete([info.key for info in store.list(f"{PREFIX}{decoder.name}/")])


def draw(generator: Generator, prompts: Sequence[str]) -> list[list[Image.Image]]:
    """The same samples by the VAE's own decoder, after the flow's score, and by the fine-tuned decoder."""
    noisy, clean = (generator.sample_latents(prompts, guidance=2.0, clean=clean) for clean in (False, True))
    return [generator.pictures(noisy), generator.pictures(clean), generator.pictures(noisy, noisy=True)]


def main() -> None:
    """One of the two tables; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="STORE/RUN of a flow, to compare with its score and on its samples")
    parser.add_argument("--decoder", help="STORE/NAME: with --checkpoint, measure this one instead of making one")
    parser.add_argument("--samples", type=int, default=54, help="with --checkpoint, of held-out captions")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning")
    parser.add_argument("--adversarial-weight", type=float, default=0.0, help="of the discriminator, second half")
    parser.add_argument("--pictures", type=int, help="fewer pictures, to try it out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="starflow-decoder-") as folder:
        (on_a_flow if options.checkpoint else on_drawings)(options, Path(folder))


if __name__ == "__main__":
    main()
