"""Pictures in and out, with stand-ins for the encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from starflow import manifest
from starflow.checkpoints import KIND, VERSION, Checkpoint, Progress, Shard, TrainedInfo, checkpoint_key
from starflow.encoders import load_vae
from starflow.errors import ConfigError, NotFoundError
from starflow.generate import Generator, heat_map
from starflow.model import FlowConfig, STARFlow
from starflow.objectstore import ObjectStore, open_store
from tests.starflow.flows import LABELS, TEXT, random_flow


class Halves:
    """A VAE of 2 x 2 averages: three colours and their mean."""

    channels, downsampling = 4, 2

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.nn.functional.avg_pool2d(images, 2)
        mean = torch.cat([small, small.mean(1, keepdim=True)], 1)
        return mean, torch.zeros_like(mean)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=2)


class Letters:
    """A text encoder of letter codes."""

    width, length = 8, 3

    def encode(self, captions: list[str]) -> torch.Tensor:
        states = torch.zeros(len(captions), 3, 8)
        for row, caption in enumerate(captions):
            for i, letter in enumerate(caption[:3]):
                states[row, i, ord(letter) % 8] = 1
        return states


def generator(config: FlowConfig = TEXT, **changes) -> Generator:
    text = Letters() if config.text_length else None
    made = Generator(random_flow(config, std=0.05), Halves(), text, latent_noise=0.1)  # type: ignore[arg-type]
    return replace(made, **changes)


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_checkpoint(store: ObjectStore, step: int, kinds: dict[str, STARFlow]) -> None:
    """A checkpoint as two ranks leave it: each holds half of every parameter."""
    shards = []
    for rank in range(2):
        refs = {}
        for kind, flow in kinds.items():
            parts = {}
            for name, tensor in flow.state_dict().items():
                middle = tensor.numel() // 2
                start, stop = (0, middle) if rank == 0 else (middle, tensor.numel())
                parts[f"{name}@{start}"] = tensor.flatten()[start:stop].clone()
            refs[kind] = manifest.put(store, f"runs/r/objects/{step}-{rank}-{kind}", save(parts))
        shards.append(Shard(**refs, optimizer=manifest.put(store, f"runs/r/objects/{step}-{rank}", b"")))
    flow = kinds["weights"]
    trained = TrainedInfo(
        run="r", step=step, samples=1, snapshot="s", vae=load_vae("emoji").identity, text_encoder=None,
        latent_noise=0.2, held_out=0,
    )  # fmt: skip
    checkpoint = Checkpoint(
        run="r", step=step, created="", code="", ranks=2, zero_stage=1, shards=shards,
        parameters={name: tensor.shape for name, tensor in flow.state_dict().items()}, model=flow.config.to_dict(),
        trained=trained, progress=Progress(samples=1, optimizer_steps=1), config={},
        metrics=manifest.put(store, "runs/r/objects/metrics", b""),
    )  # fmt: skip
    manifest.commit(store, checkpoint_key("r", step), KIND, VERSION, checkpoint.model_dump(mode="json"))


def test_a_checkpoint_opens_as_what_was_trained(tmp_path: Path) -> None:
    config = FlowConfig(32, (1, 2), patch=2, grid=(16, 16), head_dim=32)
    flows = [random_flow(config, seed, 0.05) for seed in range(4)]
    store = open_store(str(tmp_path))
    write_checkpoint(store, 5, {"weights": flows[0], "ema": flows[1]})
    write_checkpoint(store, 20, {"weights": flows[2], "ema": flows[3]})
    opened = [
        Generator.from_checkpoint(store.url, "r", 5, ema=False),
        Generator.from_checkpoint(store.url, "r", 5),
        Generator.from_checkpoint(store.url, "r", "newest", ema=False),
        Generator.open(f"{store.url}/r"),
    ]
    for made, flow in zip(opened, flows, strict=True):
        assert made.model.config == config
        assert all(torch.equal(value, flow.state_dict()[name]) for name, value in made.model.state_dict().items())
        assert (made.latent_noise, made.text_encoder, made.model.training) == (0.2, None, False)
        assert made.vae.identity.name == "emoji"
    assert [made.trained.step for made in opened] == [5, 5, 20, 20]
    (drawn,) = opened[0].sample([""], grid=(16, 16))
    assert drawn.size == (32, 32)
    with pytest.raises(NotFoundError, match="committed steps: 5, 20"):
        Generator.open(f"{store.url}/r@7")


def test_a_picture_depends_on_seed_place_and_prompt_alone() -> None:
    prompts = ["abc", "bcd", "abc"]
    together = generator().sample(prompts, seed=5, method="sequential")
    apart = generator(batch_size=1).sample(prompts, seed=5, method="sequential")
    assert [image.size for image in together] == [(8, 8)] * 3
    for one, other in zip(together, apart, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert together[0] != together[2]
    assert generator().sample(["abc"], seed=6)[0] != together[0]


def test_other_grids_and_no_denoising() -> None:
    assert generator().sample(["abc"], grid=(2, 8))[0].size == (16, 4)
    noisy, clean = (generator().sample_latents(["abc"], clean=clean) for clean in (False, True))
    assert 0 < (noisy - clean).abs().mean() < 0.2


def test_progress_reaches_the_total() -> None:
    made, seen = generator(batch_size=2), []
    made.sample(["a", "b", "c"], progress=seen.append)
    assert sum(seen) == made.tokens(3)


def test_score_tells_what_the_caption_explains() -> None:
    images = [picture(0), picture(1, (24, 8))]
    scores = generator().score(images, ["abc", ""])
    assert scores[0].explained == pytest.approx(scores[0].nats - scores[0].nats_without_caption)
    assert scores[0].explained != 0
    assert scores[1].explained == 0
    assert scores[0].per_token.shape == (4, 4)
    assert scores[0].per_token.sum() == pytest.approx(scores[0].nats, rel=1e-4)
    assert scores[1].per_token.shape == (3, 6)  # the bucket 21:9
    assert scores[0].to_dict().keys() == {"caption", "nats", "nats_without_caption", "explained", "bits_per_dim"}
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        generator().score(images, ["abc"])


def test_latents_get_the_training_noise() -> None:
    made = generator()
    clean, noisy = made.latents([picture(0)], seed=None), made.latents([picture(0)], seed=1)
    assert float((noisy - clean).std()) == pytest.approx(0.1, rel=0.3)
    assert torch.equal(made.latents([picture(1), picture(0)], seed=None)[1:], clean)


def test_interpolation_and_inpainting_give_pictures() -> None:
    made = generator()
    first, last = made.pictures(made.latents([picture(0), picture(1)], seed=None))
    seen: list[int] = []
    path = made.interpolate((picture(0), picture(1)), ("abc", ""), 4, seen.append)
    assert sum(seen) == made.batch_tokens((4, 4))
    assert len(path) == 4
    for end, expected in ((path[0], first), (path[-1], last)):
        assert np.abs(np.asarray(end, int) - np.asarray(expected, int)).max() <= 8  # Jacobi's tolerance
    mask = Image.new("L", (8, 8))
    mask.paste(255, (4, 4, 8, 8))
    seen.clear()
    filled = np.asarray(made.inpaint(picture(0), mask, "abc", rounds=2, progress=seen.append), int)
    assert sum(seen) == 2 * made.batch_tokens((4, 4))
    assert np.array_equal(filled[:4], np.asarray(first, int)[:4])
    assert not np.array_equal(filled[4:, 4:], np.asarray(first, int)[4:, 4:])


def test_class_numbers_are_prompts() -> None:
    made = generator(replace(LABELS, channels=4))
    assert made.condition(["3", ""]).tolist() == [3, 5]
    assert len(made.sample(["3", "", "1"])) == 3
    with pytest.raises(ConfigError, match=r"'cat'.*0 to 4"):
        made.sample(["cat"])


@pytest.mark.parametrize("name", ["justaname", "store/run@last", "store/@3"])
def test_checkpoint_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match=r"STORE/RUN@STEP"):
        Generator.open(name)


def test_heat_map() -> None:
    image = heat_map(np.arange(6.0).reshape(2, 3), (30, 20))
    assert image.size == (30, 20)
    assert image.getpixel((0, 0)) != image.getpixel((29, 19))
