"""What fine-tuning a decoder to noisy latents gains on the emoji VAE: PSNR on held-out pictures, and pictures.

    python benchmarks/decoder.py                                          # noise 0.3, as in the paper; about 4 minutes
    python benchmarks/decoder.py --checkpoint s3://starflow/RUN           # against that flow's score, at its noise

The first form draws the emoji and holds out the drawings that the shipped VAE has not seen either. The second takes the
pictures of the run's snapshot (after `starflow demo` and `starflow up`), holds out what the flow has not seen, and adds
the flow's own denoising step and its samples. Every line decodes the same noisy latents of the same pictures.
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

from infra.demo.emoji import write_pictures
from starflow.cache import FileCache
from starflow.console import console
from starflow.decoders import PREFIX, decoder_key, load_decoder
from starflow.encoders import VAE, DiffusersVAE, load_vae, to_pixels
from starflow.generate import Generator
from starflow.images import picture_grid
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


def fine_tune(options: argparse.Namespace, **settings: Any) -> DecoderConfig:
    """The configuration, after running it; the same folder and settings find the finished decoder."""
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

    finetune(config, on_progress)
    return config


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


def about_of(batches: list[PictureBatch], config: DecoderConfig, seconds: float) -> dict[str, Any]:
    """What the figures were measured with."""
    return machine("cpu") | {
        "held-out pictures": sum(len(batch.pixels) for batch in batches),
        "latent noise": config.latent_noise,
        "fine-tuning": f"{config.steps} steps of {config.batch_size} pictures, {seconds:.0f} s",
        "adversarial weight": config.adversarial_weight,
    }


def on_drawings(options: argparse.Namespace, folder: Path) -> None:
    """Noise as in the paper, pictures drawn here."""
    images, vae = folder / "pictures", load_vae("emoji")
    write_pictures(images, limit=options.pictures)
    began, store = time.perf_counter(), str(folder / "store")
    config = fine_tune(
        options, store=store, images=images, resolution=RESOLUTION, held_out=VAE_HELD_OUT, latent_noise=0.3
    )
    seconds = time.perf_counter() - began
    _, held_out = load_folder(images, RESOLUTION, VAE_HELD_OUT, config.seed)
    batches = [encode_pictures(vae, part, "cpu") for part in held_out.split(64)]
    rows, shown = measure(cases(vae, tuned_of(config, vae), None), batches, config.latent_noise)
    write("decoder-cpu", "Decoding noisy latents", about_of(batches, config, seconds), rows)
    names = ["original", *(row["decoded by"] for row in rows)]
    sheet([images_of(pictures) for pictures in shown], names, IMAGES / "decoder-before-after.png")


def on_a_flow(options: argparse.Namespace, folder: Path) -> None:
    """The noise of a trained flow, and its own samples."""
    generator = Generator.open(options.checkpoint, decoder="none")
    trained = generator.trained
    assert trained is not None, "a checkpoint names what it was trained on"
    store = open_store(options.checkpoint.rpartition("/")[0])
    shared = {"held_out": trained.held_out, "latent_noise": trained.latent_noise, "cache": folder}
    began = time.perf_counter()
    config = fine_tune(options, store=store.url, snapshot=trained.snapshot, **shared)
    seconds = time.perf_counter() - began
    snapshot, cache = load_snapshot(store, trained.snapshot), FileCache(folder / "snapshots")
    pictures = SnapshotPictures(store, snapshot, cache, trained.held_out, config.batch_size, config.seed)
    batches = pictures.held_out(options.pictures or 512)
    vae = load_vae(trained.vae.name)
    generator.decoder = tuned_of(config, vae)
    rows, _ = measure(cases(vae, generator.decoder, generator), batches, trained.latent_noise)
    write("decoder-flow-cpu", "Decoding noisy latents, beside a flow's score", about_of(batches, config, seconds), rows)
    noisy, clean = (generator.sample_latents(PROMPTS, guidance=2.0, clean=clean) for clean in (False, True))
    drawn = [generator.pictures(noisy), generator.pictures(clean), generator.pictures(noisy, noisy=True)]
    names = ["own decoder", "the flow's score, own decoder", "fine-tuned decoder"]
    sheet(drawn, names, IMAGES / "decoder-samples.png")
    # The store is the user's: sampling from it goes on as before.
    store.delete([decoder_key(config.name)])
    store.delete([info.key for info in store.list(f"{PREFIX}{config.name}/")])


def tuned_of(config: DecoderConfig, vae: DiffusersVAE) -> DiffusersVAE:
    store = open_store(config.store)
    return load_decoder(store, finetune(config), vae)


def main() -> None:
    """One of the two tables; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="STORE/RUN of a flow, to compare with its score and on its samples")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning")
    parser.add_argument("--adversarial-weight", type=float, default=0.0, help="of the discriminator, second half")
    parser.add_argument("--pictures", type=int, help="fewer pictures, to try it out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="starflow-decoder-") as folder:
        (on_a_flow if options.checkpoint else on_drawings)(options, Path(folder))


if __name__ == "__main__":
    main()
