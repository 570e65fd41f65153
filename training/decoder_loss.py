"""What a decoder is fine-tuned with besides pixels: LPIPS, and a patch discriminator whose weight adapts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from starflow.errors import ConfigError

#: Convolutions of VGG-16 before each pooling, as (index in torchvision's `features`, outputs); LPIPS reads each group.
VGG_GROUPS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
#: From [-1, 1] to the statistics that VGG was trained with.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
#: The adaptive weight is bounded by this, and its denominator kept above the other.
LARGEST_WEIGHT, SMALLEST_NORM = 1e4, 1e-4


class Perceptual(nn.Module):
    """LPIPS with VGG-16 (Zhang et al., arXiv 1801.03924, version 0.1): distance of pictures in feature space.

    Features after the last ReLU of each group are normalised over channels; their squared differences, weighted
    by one learned non-negative number a channel, are averaged over positions and added over the groups.
    """

    #: The smallest picture side: four poolings leave one position.
    SMALLEST = 16

    def __init__(self, state: dict[str, Tensor]) -> None:
        """`state`: as `read_perceptual` gives it."""
        super().__init__()
        inputs, groups = 3, []
        for group in VGG_GROUPS:
            convolutions = []
            for index, outputs in group:
                convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
                convolution.weight.data = state[f"features.{index}.weight"].float()
                convolution.bias.data = state[f"features.{index}.bias"].float()  # type: ignore[union-attr]
                convolutions.append(convolution)
                inputs = outputs
            groups.append(nn.ModuleList(convolutions))
        self.groups = nn.ModuleList(groups)
        for number in range(len(VGG_GROUPS)):
            self.register_buffer(f"weights{number}", state[f"lin{number}.model.1.weight"].float())
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """(B, 3, H, W) each, in [-1, 1], sides of `SMALLEST` pixels at least; returns (B,) float32."""
        x = (torch.cat([pictures, targets]) - self.get_buffer("shift")) / self.get_buffer("scale")
        distance = x.new_zeros(len(pictures))
        for number, group in enumerate(self.groups):
            x = x if number == 0 else F.max_pool2d(x, 2)
            for convolution in group.children():
                x = F.relu(convolution(x))
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            weighted = (a - b).square() * self.get_buffer(f"weights{number}")
            distance = distance + weighted.sum(1).mean((1, 2))
        return distance


def read_perceptual(files: Sequence[Path]) -> dict[str, Tensor]:
    """Weights for `Perceptual` out of .pth (no pickled code is run) or .safetensors files that together hold them.

    That is torchvision's VGG-16 (``features.*``, its classifier is ignored) and LPIPS's five linear maps
    (``lin*.model.1.weight``). Raises ConfigError naming file, what is missing, and where both are to be had.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                state |= torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:  # its own message advises to run the file's code
            raise ConfigError(f"perceptual weights {file} hold something other than tensors by name") from error
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            raise ConfigError(f"perceptual weights {file} cannot be read: {str(error).splitlines()[0]}") from error
    wanted = [f"features.{i}.{kind}" for group in VGG_GROUPS for i, _ in group for kind in ("weight", "bias")]
    wanted += [f"lin{number}.model.1.weight" for number in range(len(VGG_GROUPS))]
    if missing := [name for name in wanted if name not in state]:
        raise ConfigError(
            f"perceptual weights {', '.join(map(str, files))} lack {missing[0]} and {len(missing) - 1} more; give both "
            "torchvision's vgg16-397923af.pth and vgg.pth of the package lpips (version 0.1)"
        )
    return {name: state[name] for name in wanted}


class PatchDiscriminator(nn.Sequential):
    """(B, 3, H, W) to one logit for each of many overlapping patches (Isola et al., arXiv 1611.07004).

    Group normalisation, so that a batch's composition decides nothing and there are no running statistics.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        """`layers` halvings of the resolution, of `width` channels first, doubled up to eightfold."""
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        inputs = width
        for number in range(1, layers + 1):
            outputs = width * min(2**number, 8)
            stride = 2 if number < layers else 1
            modules += [nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False), nn.GroupNorm(8, outputs)]
            modules.append(nn.LeakyReLU(0.2))
            inputs = outputs
        super().__init__(*modules, nn.Conv2d(inputs, 1, 4, 1, 1))

    @staticmethod
    def smallest(layers: int) -> int:
        """The smallest picture side that leaves a logit: the two last convolutions each take one position."""
        return 3 * 2**layers


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on logits of real and decoded pictures; a scalar (Lim and Ye, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """|d reconstruction / d last| / |d adversarial / d last|, a scalar: both losses pull the last layer equally.

    Equation 7 of Esser et al., arXiv 2012.09841. The graphs are kept.
    """
    (first,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (first.norm() / (second.norm() + SMALLEST_NORM)).clamp(max=LARGEST_WEIGHT)
