"""Weights for a new run out of another run's checkpoint: fine-tuning, or the same model at a higher resolution."""

from __future__ import annotations

import torch
from torch import Tensor

from starflow.checkpoints import TrainedInfo, iterate_weights, load_manifest, parse_checkpoint
from starflow.errors import ConfigError
from starflow.model import STARFlow
from starflow.objectstore import open_store
from training.resume import check_same_encoders


@torch.no_grad()
def initialise(flow: STARFlow, checkpoint: str, trained: TrainedInfo) -> None:
    """Fills `flow` with the averaged weights of `checkpoint` (STORE/RUN or STORE/RUN@STEP).

    `trained` tells which encoders the new run uses. A larger patch is allowed: its cells start alike, each from
    the weights of the smaller patch. Raises ConfigError naming both sides where anything else differs.
    """
    url, run, step = parse_checkpoint(checkpoint)
    store = open_store(url)
    found = load_manifest(store, run, step)
    check_same_encoders(trained, found.trained, checkpoint)
    parameters = dict(flow.named_parameters())
    if parameters.keys() != found.parameters.keys():
        odd = sorted(parameters.keys() ^ found.parameters.keys())
        raise ConfigError(
            f"{checkpoint} has layers {found.flow.layers}, the model to be trained {flow.config.layers}: "
            f"{odd[0]} and {len(odd) - 1} more parameters are only in one of them"
        )
    cells = flow.config.patch**2 / found.flow.patch**2
    for name, values in iterate_weights(store, found, "ema"):
        target = parameters[name]
        if values.shape != target.shape:
            values = (
                _spread(name, values, int(cells), found.flow.token_width) if cells > 1 and cells % 1 == 0 else values
            )
        if values.shape != target.shape:
            raise ConfigError(
                f"{checkpoint} has {name} of shape {tuple(values.shape)}, the model to be trained "
                f"{tuple(target.shape)}; only a larger patch can be started from other shapes"
            )
        target.copy_(values)


def _spread(name: str, values: Tensor, cells: int, token: int) -> Tensor:
    """Weights of a token of `token` values, repeated for one of `cells` times as many (cell-major, as patchify)."""
    kind = name.rpartition("blocks.")[2].partition(".")[2]
    if kind == "start":
        return values.repeat(1, 1, cells)
    if kind == "embed.weight":
        return values.repeat(1, cells) / cells
    if kind == "head.weight":
        return values.view(2, token, -1).repeat(1, cells, 1).flatten(0, 1)
    if kind == "head.bias":
        return values.view(2, token).repeat(1, cells).flatten()
    return values
