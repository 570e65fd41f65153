"""Tensors on a local disk: memory-mapped files, which the operating system reads and writes as they are used.

DeepSpeed's own NVMe offload needs an operator built against libaio and swaps the state away between steps, where
no checkpoint could see it. This needs nothing, works with every ZeRO stage, and the state stays addressable.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from starflow.errors import ConfigError


def zeros_on_disk(folder: Path, count: int) -> Tensor:
    """(count,) float32 zeros in a file of `folder` that vanishes with this process, however that ends.

    Raises ConfigError when the folder does not take it: all of the space is reserved at once.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="starflow-") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * max(1, count))
            return torch.from_file(file.name, shared=True, size=count, dtype=torch.float32)
    except OSError as error:
        raise ConfigError(
            f"nvme_path {folder} does not take {4 * count} bytes of optimizer state: {error.strerror or error}; "
            "make room there, or choose another folder"
        ) from error
