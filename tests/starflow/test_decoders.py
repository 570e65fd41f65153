"""Fine-tuned decoders, the reading side: which one sampling takes, and that it takes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from typer.testing import CliRunner

from starflow import manifest
from starflow.checkpoints import TrainedInfo
from starflow.cli import app
from starflow.decoders import (
    Decoder,
    Quality,
    check_decoder,
    choose_decoder,
    decoder_key,
    find_decoder,
    list_decoders,
    load_decoder,
    read_decoder,
)
from starflow.encoders import DiffusersVAE, EncoderError, load_vae
from starflow.errors import ConfigError, CorruptError, NotFoundError
from starflow.generate import Generator
from starflow.model import FlowConfig
from starflow.objectstore import ObjectStore, open_store
from tests.starflow.flows import random_flow

torch.set_num_threads(1)

NOISE = 0.2
FLOW = FlowConfig(64, (1, 1), patch=2, grid=(16, 16))


@pytest.fixture(scope="module")
def vae() -> DiffusersVAE:
    return load_vae("emoji")


def shifted(vae: DiffusersVAE, by: float) -> dict[str, torch.Tensor]:
    """The VAE's decoder, but every picture `by` brighter."""
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in vae.decoder_state().items()}
    state["decoder.conv_out.bias"] += by
    return state


def commit(store: ObjectStore, module: DiffusersVAE, name: str, by: float = 0.5, **changes: object) -> Decoder:
    data = save(shifted(module, by))
    decoder = Decoder(
        name=name,
        created="2026-01-01T00:00:00+00:00",
        code="0",
        vae=module.identity,
        latent_noise=NOISE,
        steps=1,
        weights=manifest.put(store, f"decoders/{name}/weights.safetensors", data),
        quality=Quality(pictures=1, plain=1, tuned=2),
        config={},
    ).model_copy(update=changes)
    manifest.commit(store, decoder_key(name), "decoder", 1, decoder.model_dump(mode="json"))
    return decoder


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def test_another_decoder_in_the_same_vae(vae: DiffusersVAE, store: ObjectStore) -> None:
    tuned = load_decoder(store, commit(store, vae, "bright"), vae)
    latents = torch.randn(2, 4, 8, 8)
    assert torch.allclose(tuned.decode(latents), vae.decode(latents) + 0.5, atol=1e-5)
    assert tuned.identity == vae.identity
    assert tuned.module.encoder is vae.module.encoder
    assert tuned.module.decoder is not vae.module.decoder


def test_weights_of_another_architecture_or_damaged_ones_are_refused(vae: DiffusersVAE, store: ObjectStore) -> None:
    state = shifted(vae, 0)
    with pytest.raises(EncoderError, match=r"VAE emoji: decoder\.conv_out\.bias differ"):
        vae.with_decoder({name: value for name, value in state.items() if name != "decoder.conv_out.bias"})
    with pytest.raises(EncoderError, match="shapes differ"):
        vae.with_decoder(state | {"decoder.conv_out.bias": torch.zeros(5)})
    decoder = commit(store, vae, "d")
    store.write(decoder.weights.key, b"damaged")
    with pytest.raises(CorruptError, match=r"weights\.safetensors is corrupt"):
        load_decoder(store, decoder, vae)


def test_auto_takes_the_newest_for_this_vae_and_noise(vae: DiffusersVAE, store: ObjectStore) -> None:
    assert choose_decoder("auto", store, vae, NOISE) is None
    commit(store, vae, "b", by=0.1)
    newest = commit(store, vae, "a", by=0.3, created="2026-02-01T00:00:00+00:00")
    commit(store, vae, "c", created="2026-03-01T00:00:00+00:00", latent_noise=0.3)
    other = vae.identity.model_copy(update={"sha256": "f" * 64})
    commit(store, vae, "d", created="2026-03-01T00:00:00+00:00", vae=other)
    store.write("decoders/e/weights.safetensors", b"not finished")
    assert [decoder.name for decoder in list_decoders(store)] == ["b", "a", "c", "d"]
    assert find_decoder(store, vae.identity, NOISE) == newest
    latents = torch.zeros(1, 4, 8, 8)
    for choice, by in (("auto", 0.3), (f"{store.url}/b", 0.1)):
        tuned = choose_decoder(choice, store, vae, NOISE)
        assert tuned is not None
        assert torch.allclose(tuned.decode(latents), vae.decode(latents) + by, atol=1e-5)
    assert choose_decoder("none", store, vae, NOISE) is None


def test_what_does_not_belong_together_is_named(vae: DiffusersVAE, store: ObjectStore) -> None:
    decoder = commit(store, vae, "d")
    other = vae.identity.model_copy(update={"name": "sd", "sha256": "f" * 64})
    with pytest.raises(ConfigError, match=rf"d belongs to the VAE emoji \({vae.identity.sha256[:12]}\).*sd \(ffffff"):
        check_decoder(decoder, other, NOISE)
    with pytest.raises(ConfigError, match=r"noise 0\.2, the flow's have noise 0\.3.*latent_noise=0\.3"):
        choose_decoder(f"{store.url}/d", store, vae, 0.3)
    with pytest.raises(ConfigError, match="'d' is not STORE/NAME"):
        read_decoder("d")
    with pytest.raises(NotFoundError, match=r"decoder 'e' is not in .* which holds: d"):
        read_decoder(f"{store.url}/e")
    with pytest.raises(NotFoundError, match="none; see starflow finetune-decoder"):
        read_decoder(f"{store.url}/elsewhere/e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vae: DiffusersVAE) -> Path:
    """An exported checkpoint of an unconditional flow, with a decoder beside it."""
    folder = tmp_path_factory.mktemp("exported")
    trained = TrainedInfo(
        run="r", step=1, samples=1, snapshot="s", vae=vae.identity, text_encoder=None, latent_noise=NOISE, held_out=0
    )
    save_file(random_flow(FLOW, std=0.05).state_dict(), folder / "model.safetensors")
    described = {"model": FLOW.to_dict(), "trained": trained.model_dump()}
    (folder / "config.json").write_text(json.dumps(described))
    commit(open_store(str(folder)), vae, "bright")
    return folder


def test_sampling_decodes_the_noisy_latents_and_takes_no_score_step(folder: Path, monkeypatch) -> None:
    generator = Generator.from_folder(folder)
    assert generator.decoder is not None
    noisy = generator.sample_latents([""], clean=False)
    expected = generator.decoder.decode(noisy)
    with monkeypatch.context() as patch:
        patch.setattr("starflow.generate.denoise", None)  # calling it would fail
        tuned = generator.sample([""])[0]
    pixels = ((expected[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(tuned, int) - pixels).max() <= 1
    # As they are, with the plain decoder; and without the fine-tuned one, after the score.
    assert generator.sample([""], denoise=False) == generator.pictures(noisy) != [tuned]
    plain = Generator.from_folder(folder, decoder="none")
    assert plain.decoder is None
    assert plain.sample([""]) == plain.pictures(plain.sample_latents([""], clean=True)) != [tuned]
    # Clean latents are the plain decoder's.
    latents = generator.latents([tuned], seed=None)
    assert generator.pictures(latents) == plain.pictures(latents) != generator.pictures(latents, noisy=True)


def test_the_command_chooses_the_decoder(folder: Path, tmp_path: Path) -> None:
    def draw(decoder: str) -> bytes:
        out = tmp_path / "out.png"
        arguments = ["sample", "", "--checkpoint", str(folder), "--out", str(out), "--decoder", decoder]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return out.read_bytes()

    auto, none, named = (draw(choice) for choice in ("auto", "none", f"{folder}/bright"))
    assert auto == named != none
