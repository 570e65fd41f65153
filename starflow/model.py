"""STARFlow: a transformer normalizing flow on image latents, exact in both directions.

After Gu et al., "STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis"
(arXiv 2506.06276), which builds on Zhai et al., "Normalizing Flows are Capable Generative Models"
(TARFlow, arXiv 2412.06329).

- A stack of autoregressive affine blocks. In the direction data -> noise every token is shifted and scaled
  by a Gaussian that a causal transformer predicts from the tokens before it, all tokens at once; noise ->
  data runs the same network token by token. Consecutive blocks read the tokens in opposite orders.
- Deep-shallow: all blocks but the last have few layers and see no text; the last is deep and reads the text
  as a prefix of its sequence.
- Pre-norm layers, fused query/key/value, rotary positions for row, column and text index, exact GELU.
- A soft-clipped affine head, zero at the start (the untrained flow is the identity), always in float32.

Symbols in the shape comments: B batch, C latent channels, (H, W) latent grid, p patch size,
T = (H/p)(W/p) image tokens, D = C p^2 values per token, L prefix (text or label) tokens, E text width,
M model width, N heads, d head width, K blocks.

Sign of every log-determinant: `forward` returns log |dz/dx| = -log sigma, `inverse` returns
log |dx/dz| = +log sigma, per element (B, T, D), unreduced, one tensor per block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from starflow.architecture import TEXT_ANGLES
from starflow.architecture import FlowConfig as FlowConfig  # its public home is here

if TYPE_CHECKING:
    from starflow.decoding import KeyValues

#: The head's pre-activations pass through CLIP * tanh(v / CLIP).
CLIP = 4.0
#: softplus(0 + SIGMA_SHIFT) = 1: a head of zeros leaves its token unchanged.
SIGMA_SHIFT = 0.541324854612918

Checkpointing = Literal["none", "selective", "full"]


class FlowOutput(NamedTuple):
    """What one pass from data to noise gives; float32 at least.

    A named tuple, so that wrappers which look for tensors in outputs (DeepSpeed, DDP) find them.
    """

    #: (B, C, H, W) the noise.
    z: Tensor
    #: K tensors (B, T, D), log |dz/dx| per element, each in its block's own order.
    logdets: list[Tensor]
    #: () mean over the batch of 0.5 mean(z^2) - sum over blocks of mean(logdet): nats per dimension up to a constant.
    loss: Tensor
    #: (B,) negative log-likelihood in nats per dimension, exact: `nll.mean() = loss + 0.5 log(2 pi)`.
    nll: Tensor
    #: K + 1 tensors (B, T, D) in grid order: the patched input, then each block's output.
    states: list[Tensor]

    def regulariser(self) -> Tensor:
        """() sum of mean(v^2) over the input and the outputs of all blocks but the last (recipe: times 1e-4)."""
        return torch.stack([state.square().mean() for state in self.states[:-1]]).sum()


class InverseOutput(NamedTuple):
    """What one pass from noise to data gives: x (B, C, H, W) and K log-determinants log |dx/dz| (B, T, D)."""

    x: Tensor
    logdets: list[Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """The Gaussian part is computed in float32, or in float64 when the whole model is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary_angles(grid: tuple[int, int], nominal: float, text_length: int, head_dim: int) -> Tensor:
    """(L + T, d/2) float64 angles of text tokens, then of the row-major token grid (2D rotary embedding).

    Row and column positions are those of a square of `nominal` tokens with the same area, so that aspect
    ratios share one scale; text token i of L lies at i / L * nominal on an axis of its own.
    """
    height, width = grid
    image = head_dim // 2 - TEXT_ANGLES
    scale = nominal / math.sqrt(height * width)
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    space = 10000 ** (-2 * torch.arange(image // 2, dtype=torch.float64) / image)
    index = 10000 ** (-torch.arange(TEXT_ANGLES, dtype=torch.float64) / TEXT_ANGLES)
    angles = torch.zeros(text_length + height * width, head_dim // 2, dtype=torch.float64)
    angles[text_length:, : image // 2] = rows.reshape(-1, 1) * scale * space
    angles[text_length:, image // 2 : image] = columns.reshape(-1, 1) * scale * space
    if text_length:
        angles[:text_length, image:] = torch.arange(text_length).reshape(-1, 1) / text_length * nominal * index
    return angles


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotates channel pairs (j, j + d/2) of `x` (B, S, heads, d) by a `rotary_table` (2, S, 1, d).

    The released layout pairs neighbours (2j, 2j + 1). Which channels form a pair does not change a dot product
    between rows that agree on it, and halves are contiguous, so `convert` reorders the rows of q and k.
    """
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def rotary_table(angles: Tensor) -> Tensor:
    """(S, d/2) angles -> (2, S, 1, d): cosines, and sines that carry the sign of the other half's share."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).unsqueeze(2)


class Attention(nn.Module):
    """Pre-norm causal self-attention with rotary positions."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Tensor, cache: KeyValues | None = None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, -1, self.head_dim)  # (B, S, 3N, d)
        heads = width // self.head_dim
        qk, v = qkv.split([2 * heads, heads], dim=2)
        q, k = rotate(qk, rotary).chunk(2, dim=2)
        y = causal_attention(q, k, v) if cache is None else cache.attend(q, k, v)
        return self.out(y.reshape(batch, length, width))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over (B, S, N, d), all of one length.

    PyTorch's fused CPU kernel is four times slower in bfloat16 (forward and backward) than two matrix products
    with a softmax between, which fit in memory at these lengths; elsewhere the fused kernel wins.
    """
    batch, length, heads, _ = q.shape
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or length > 1024:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))  # (B N, S, d)
    mask = q.new_full((length, length), -torch.inf).triu(1)
    y = torch.bmm(torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2)), dim=-1), v)
    return y.unflatten(0, (batch, heads)).transpose(1, 2)


class MLP(nn.Module):
    """Pre-norm feed-forward network with exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Layer(nn.Module):
    """One transformer layer, (B, S, M) -> (B, S, M): the unit of compilation and of checkpointing."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, rotary: Tensor, cache: KeyValues | None = None) -> Tensor:
        x = x + self.attention(x, rotary, cache)
        return x + self.mlp(x)


class Head(nn.Module):
    """RMSNorm with unit offset, a linear map, soft clip: (B, S, M) -> sigma, mean (B, S, D), float32 throughout."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.zeros(2 * token_width, width))
        self.bias = nn.Parameter(torch.zeros(2 * token_width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            x, gain = at_least_float32(x), at_least_float32(self.norm)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + gain)
            v = F.linear(x, at_least_float32(self.weight), at_least_float32(self.bias))
            a, mean = (CLIP * torch.tanh(v / CLIP)).chunk(2, dim=-1)
            return F.softplus(a + SIGMA_SHIFT), mean


class Block(nn.Module):
    """One autoregressive affine transformation of a token sequence (B, T, D) in this block's order."""

    def __init__(self, config: FlowConfig, layers: int, deep: bool) -> None:
        super().__init__()
        self.start = nn.Parameter(0.01 * torch.randn(1, 1, config.token_width))
        self.embed = nn.Linear(config.token_width, config.width)
        self.text: nn.Linear | None = None
        self.label: nn.Embedding | None = None
        if deep and config.text_length:
            self.text = nn.Linear(config.text_width, config.width)
        if deep and config.classes:
            self.label = nn.Embedding(config.classes + 1, config.width)
        self.sees_text = self.text is not None or self.label is not None
        self.layers = nn.ModuleList(Layer(config.width, config.head_dim) for _ in range(layers))
        self.head = Head(config.width, config.token_width)

    def prefix(self, text: Tensor | None) -> Tensor | None:
        """(B, L, M) embedded text or label; None in a block that sees neither."""
        if self.text is not None and text is not None:
            return self.text(text.to(self.text.weight.dtype))
        if self.label is not None and text is not None:
            return self.label(text).unsqueeze(1)
        return None

    def gaussians(
        self, u: Tensor, text: Tensor | None, rotary: Tensor, run: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        """sigma and mean (B, T, D) of each token given the tokens before it."""
        shifted = torch.cat([self.start.to(u.dtype).expand(len(u), -1, -1), u[:, :-1]], dim=1)
        h = self.embed(shifted.to(self.embed.weight.dtype))  # (B, T, M)
        prefix = self.prefix(text)
        length = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            h = torch.cat([prefix, h], dim=1)  # (B, L + T, M)
        rotary = rotary[:, rotary.shape[1] - h.shape[1] :]  # shallow blocks skip the text positions
        for layer in self.layers:
            h = run(layer, h, rotary)
        return self.head(h[:, length:])

    def forward(
        self, u: Tensor, text: Tensor | None, rotary: Tensor, run: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Data -> noise: z = (u - mean) / sigma and its log-determinant -log sigma, all tokens at once."""
        sigma, mean = self.gaussians(u, text, rotary, run)
        return (u - mean) / sigma, -sigma.log()


class STARFlow(nn.Module):
    """The flow. Call it with latents (and text) for noise, log-determinants and the exact likelihood."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing: Checkpointing = "none"
        last = len(config.layers) - 1
        self.blocks = nn.ModuleList(Block(config, n, deep=k == last) for k, n in enumerate(config.layers))
        # A plain dict, not buffers: wrappers that cast or partition buffers would ruin the angles' precision.
        self._rotary: dict[tuple[Any, ...], Tensor] = {}

    def forward(self, x: Tensor, text: Tensor | None = None) -> FlowOutput:
        """Data -> noise.

        x: (B, C, H, W) float latents of any grid divisible by the patch.
        text: (B, L, E) encoder states, with padded positions zero; or (B,) int64 labels of a class-conditional
            model. None means all positions padded, or the "no label" embedding. The null caption used for
            guidance is the encoder's state of "", which is not None.

        Raises ValueError for shapes that do not fit the config and for values that are not finite.
        """
        grid, text = self.check(x, text)
        u = self.patchify(at_least_float32(x))
        rotary = self.rotary(grid, u.device, u.dtype)
        run = self._run()
        states, logdets = [u], []
        for k, block in enumerate(self.blocks):
            z, logdet = block(in_order(k, u), text, rotary, run)
            u = in_order(k, z)
            states.append(u)
            logdets.append(logdet)
        per_sample = 0.5 * u.square().mean((1, 2)) - sum(logdet.mean((1, 2)) for logdet in logdets)  # (B,)
        nll = per_sample + 0.5 * math.log(2 * math.pi)
        return FlowOutput(self.unpatchify(u, grid), logdets, per_sample.mean(), nll, states)

    def inverse(self, z: Tensor, text: Tensor | None = None) -> InverseOutput:
        """Noise -> data, exact and token by token: the inverse of `forward` and its log-determinants.

        Shapes and errors as in `forward`; no gradients. For guidance, Jacobi decoding, progress: `starflow.sampling`.
        """
        from starflow.decoding import invert  # the cached decoder builds on the classes above

        return invert(self, z, text)

    def check(self, x: Tensor, text: Tensor | None) -> tuple[tuple[int, int], Tensor | None]:
        """Token grid and condition (None replaced by what it stands for); ValueError for what does not fit."""
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.channels:
            raise ValueError(f"latents of shape {tuple(x.shape)}; the model expects (B, {config.channels}, H, W)")
        if not x.is_floating_point():
            raise ValueError(f"latents of type {x.dtype}; the model expects floating point")
        grid = config.tokens(*x.shape[2:])
        text = self._check_condition(x, text)
        if not torch.compiler.is_compiling() and (x.device.type == "cpu" or not self.training):
            for name, tensor in (("latents", x), ("text", text)):  # on a training GPU this would wait for it
                if tensor is not None and not torch.isfinite(tensor).all():
                    count = int((~torch.isfinite(tensor)).sum())
                    raise ValueError(f"{name} of shape {tuple(tensor.shape)} hold {count} values that are not finite")
        return grid, text

    def _check_condition(self, x: Tensor, text: Tensor | None) -> Tensor | None:
        config, batch = self.config, len(x)
        if config.classes:
            if text is None:
                return torch.full((batch,), config.classes, device=x.device)
            if text.shape != (batch,) or text.is_floating_point():
                raise ValueError(f"labels of shape {tuple(text.shape)}; the model expects ({batch},) integers")
            return text
        expected = (batch, config.text_length, config.text_width)
        if config.text_length:
            if text is None:
                return x.new_zeros(expected)
            if text.shape != expected:
                raise ValueError(f"text of shape {tuple(text.shape)}; the model expects {expected}")
            return text
        if text is not None:
            raise ValueError(f"text of shape {tuple(text.shape)} for an unconditional model; pass None")
        return None

    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D): cells row-major; in a token row, column, then channel, channel fastest."""
        p = self.config.patch
        x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, C, H/p, p, W/p, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, T, D) -> (B, C, H, W) for a token grid (H/p, W/p)."""
        p = self.config.patch
        u = u.unflatten(1, grid).unflatten(3, (p, p, self.config.channels))  # (B, H/p, W/p, p, p, C)
        return u.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).contiguous()

    def rotary(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """(2, L + T, 1, d) rotary table, computed once per grid."""
        key = (grid, device, dtype)
        if key not in self._rotary:
            config = self.config
            nominal = math.sqrt(math.prod(config.tokens(*config.grid)))
            with torch.inference_mode(False):  # a table made while sampling may serve a training step later
                angles = rotary_angles(grid, nominal, config.prefix_length, config.head_dim)
                self._rotary[key] = rotary_table(angles).to(device=device, dtype=dtype)
        return self._rotary[key]

    def compile_layers(self, **options: Any) -> None:
        """Compiles each layer with `torch.compile`: one compilation serves all; works under ZeRO-3's hooks."""
        for block in self.blocks:
            for layer in block.layers:  # type: ignore[union-attr]
                layer.compile(**options)

    def _run(self) -> Callable[..., Tensor]:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return lambda layer, h, rotary: layer(h, rotary)
        if self.checkpointing == "full":
            return partial(checkpoint, use_reentrant=False)
        contexts = partial(create_selective_checkpoint_contexts, keep_matrix_products)
        return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def in_order(block: int, u: Tensor) -> Tensor:
    """Grid order <-> the order in which block number `block` reads: reversed when block + 1 is odd."""
    return u.flip(1) if block % 2 == 0 else u


def keep_matrix_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing: keep what costs FLOPs (matrix products, attention), recompute the rest."""
    aten = torch.ops.aten
    kept = {
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
