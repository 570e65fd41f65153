"""The only user of DeepSpeed: forward, backward and optimizer step under ZeRO 0 to 3, state as named fragments.

ZeRO shares the float32 masters and moments between ranks in flat, padded partitions whose layout depends on
stage and world size. Checkpoints do not: here each rank's share is described as fragments, that is as ranges
of named parameters, so that any layout can be filled from any other.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from starflow.model import STARFlow
from training.config import TrainConfig
from training.offload import zeros_on_disk

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of a flattened parameter that this rank's optimizer owns.

    name: parameter; start: first value's position in the flattened parameter.
    master, exp_avg, exp_avg_sq: (n,) float32 views of the live state.
    """

    name: str
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class StepResult:
    """Global gradient norm before clipping, and whether the weights moved (not after a spike or NaN)."""

    grad_norm: float
    applied: bool


class Objective(nn.Module):
    """Flow plus loss, so that the wrapped module's output is what gets differentiated."""

    def __init__(self, flow: STARFlow, autocast: bool, regularization: float) -> None:
        super().__init__()
        self.flow = flow
        self.autocast, self.regularization = autocast, regularization

    def forward(self, latents: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) float32 latents and their condition to (loss (), nll (B,) in nats per dimension).

        Latents that are not finite give a loss that is not finite instead of an error: ranks agree on it later.
        """
        poison = (latents.detach() * 0).sum()
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.flow(torch.nan_to_num(latents, 0.0, 0.0, 0.0), condition)
        loss = output.loss + poison
        if self.regularization:
            loss = loss + self.regularization * output.regulariser()
        return loss, output.nll + poison


def deepspeed_config(config: TrainConfig, parameters: int) -> dict[str, Any]:
    """The DeepSpeed dictionary: generated, so that no second file holds the batch size."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        # A bucket larger than the model would only be allocated in vain at each step.
        "reduce_bucket_size": min(100_000_000, parameters),
        "allgather_bucket_size": min(500_000_000, parameters + parameters % 2),
    }
    if config.checkpointing != "none":
        # DeepSpeed's linear layer adds the bias in place to the product that selective checkpointing keeps, and so
        # twice. What it is for, not to keep gathered weights for the backward pass, checkpointing does as well.
        zero["memory_efficient_linear"] = False
    if config.offload != "none":
        # For DeepSpeed "nvme" is the CPU, too: the tensors that its optimizer updates are then mapped files.
        target: dict[str, Any] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = target
        if config.zero_stage == 3:
            zero["offload_param"] = target
    return {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "zero_optimization": zero,
        # The generated dictionary brings its own AdamW; without this DeepSpeed insists on building its C++ one.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def parameter_groups(flow: STARFlow, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, start tokens and embeddings do not."""
    embeddings = {id(p) for m in flow.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decay = [p for p in flow.parameters() if p.ndim == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decay}
    rest = [p for p in flow.parameters() if id(p) not in chosen]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


class Engine:
    """A model under training on this rank; every method that moves data must be called by all ranks."""

    def __init__(self, flow: STARFlow, config: TrainConfig) -> None:
        deepspeed = _import_deepspeed()
        self.flow, self.config = flow, config
        self.shapes = {name: tuple(p.shape) for name, p in flow.named_parameters()}
        names = {id(p): name for name, p in flow.named_parameters()}
        flow.checkpointing = config.checkpointing
        if config.compile:
            flow.compile_layers()
        objective = Objective(flow, config.precision == "autocast", config.regularization)
        optimizer = torch.optim.AdamW(
            parameter_groups(flow, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
        )
        parameters = sum(p.numel() for p in flow.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            model_parameters=flow.parameters(),
            config=deepspeed_config(config, parameters),
            dist_init_required=False,
        )
        self.device = torch.device(self._engine.device)
        self._adam: torch.optim.Optimizer = optimizer
        #: Gradient norms above this are skipped; the loop moves it. All ranks must set the same value.
        self.norm_limit = math.inf
        self._norm, self._skip = math.nan, False
        self._create_moments()
        if config.zero_stage:
            self._guard_steps()
        #: This rank's share of the state, in the order of the parameters.
        self.fragments: list[Fragment] = list(self._fragments(names))

    # Training -------------------------------------------------------------------------------------------

    def backward(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """Accumulates gradients over the step's micro batches; () mean loss and () mean nll of this rank."""
        loss_sum, nll_sum = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for number, (latents, condition) in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss, nll = self._engine(latents, condition)
            self._engine.backward(loss)
            if number < len(batches) - 1:
                self._engine.step()
            loss_sum += loss.detach()
            nll_sum += nll.detach().mean()
        return loss_sum / len(batches), nll_sum / len(batches)

    def step(self, learning_rate: float, skip: bool = False) -> StepResult:
        """Clips and applies the gradients, unless told to `skip` or their norm is not finite or above `norm_limit`.

        `skip` must be the same on all ranks.
        """
        self._skip = skip
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        if self.config.zero_stage == 0:
            return self._plain_step(skip)
        self._engine.step()
        return StepResult(self._norm, bool(self._engine.was_step_applied()))

    @torch.no_grad()
    def evaluate(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """(B,) float32 negative log-likelihoods in nats per dimension."""
        self._engine.eval()
        _, nll = self._engine(latents, condition)
        self._engine.train()
        return nll.float()

    def _plain_step(self, skip: bool) -> StepResult:
        """ZeRO 0: gradients are whole on every rank, and DeepSpeed would apply them whatever they are."""
        norm = nn.utils.get_total_norm([p.grad for p in self.flow.parameters() if p.grad is not None])
        self._norm = float(norm)
        applied = not skip and self._is_fit(self._norm)
        if applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return StepResult(self._norm, applied)

    def _guard_steps(self) -> None:
        """Puts our check in the place of DeepSpeed's overflow check, whose outcome makes it skip the step.

        DeepSpeed looks at 16-bit gradients only and knows of no spikes. The norm is the same on all ranks,
        so they agree.
        """
        optimizer = self._engine.optimizer

        def unfit(*args: Any, **kwargs: Any) -> bool:
            norm = float(self._global_norm())
            self._norm = norm if norm >= 0 else math.nan  # DeepSpeed's sign for "not finite" is -1
            optimizer.overflow = self._skip or not self._is_fit(self._norm)
            return bool(optimizer.overflow)

        if self.config.zero_stage == 3:
            optimizer._overflow_check_and_loss_scale_update = unfit
        else:
            optimizer.check_grad_overflow = True
            optimizer.has_overflow = unfit

    def _is_fit(self, norm: float) -> bool:
        return math.isfinite(norm) and norm <= self.norm_limit  # at first the limit is infinite, too

    def _global_norm(self) -> Any:
        optimizer = self._engine.optimizer
        if self.config.zero_stage < 3:
            return optimizer.scaled_global_norm()
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(optimizer._get_norm_groups())

    # State ----------------------------------------------------------------------------------------------

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far: AdamW's bias correction depends on it."""
        return int(self._adam.state[self._flats()[0]]["step"])

    def set_optimizer_steps(self, steps: int) -> None:
        for flat in self._flats():
            self._adam.state[flat]["step"].fill_(steps)

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Copies the (just loaded) masters into the weights that the forward pass uses, on all ranks."""
        optimizer = self._engine.optimizer
        if self.config.zero_stage in (1, 2):
            optimizer.update_lp_params()
        elif self.config.zero_stage == 3:
            optimizer._partition_all_parameters()
            for number, flat in enumerate(optimizer.fp16_partitioned_groups_flat):
                flat.copy_(optimizer.fp32_partitioned_groups_flat[number])
                partitions = optimizer.fp16_partitioned_groups[number]
                for partition, value in zip(partitions, optimizer.unflatten(flat, partitions), strict=True):
                    partition.data = value.data
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        else:
            self._gather_plain()

    def _gather_plain(self) -> None:
        """ZeRO 0 keeps whole weights and moments everywhere; each rank has loaded its range of each."""
        for parameter in self.flow.parameters():
            tensors = [parameter.data, *(self._adam.state[parameter][key] for key in MOMENTS)]
            for tensor in tensors:
                start, stop = _share(tensor.numel(), dist.get_rank(), dist.get_world_size())
                flat = tensor.view(-1)
                flat[:start], flat[stop:] = 0, 0
                dist.all_reduce(flat)

    def _flats(self) -> list[Tensor]:
        """The tensors that AdamW updates on this rank."""
        if self.config.zero_stage == 0:
            return [p for group in self._adam.param_groups for p in group["params"]]
        if self.config.zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _create_moments(self) -> None:
        """What AdamW would create at its first step: made now, a snapshot has one layout from the start.

        With offload to a disk they and the masters lie there.
        """
        folder = self.config.nvme_path if self.config.offload == "nvme" else None
        for flat in self._flats():
            if folder:
                flat.data = zeros_on_disk(folder, flat.numel()).copy_(flat.data)
            state = self._adam.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                for key in MOMENTS:
                    state[key] = (
                        zeros_on_disk(folder, flat.numel())
                        if folder
                        else torch.zeros_like(flat, memory_format=torch.preserve_format)
                    )

    def _fragments(self, names: dict[int, str]) -> list[Fragment]:
        locate = {0: self._locate_plain, 3: self._locate_partitioned}.get(self.config.zero_stage, self._locate_flat)
        fragments = []
        for parameter in self.flow.parameters():
            place = locate(parameter)
            if place is None:
                continue
            flat, offset, start, count = place
            state = self._adam.state[flat]
            master, *moments = (t.detach().view(-1)[offset : offset + count] for t in (flat, *map(state.get, MOMENTS)))
            fragments.append(Fragment(names[id(parameter)], start, master, *moments))
        return fragments

    def _locate_plain(self, parameter: Tensor) -> tuple[Tensor, int, int, int] | None:
        start, stop = _share(parameter.numel(), dist.get_rank(), dist.get_world_size())
        return (parameter, start, start, stop - start) if stop > start else None

    def _locate_flat(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._flats()[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return flat, address.start, mapping.lp_fragment_address.start, address.numel

    def _locate_partitioned(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        optimizer = self._engine.optimizer
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank() * padded
        count = min(padded, parameter.ds_numel - start)
        return (self._flats()[group], offset, start, count) if count > 0 else None


def _share(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """This rank's contiguous range of `count` values."""
    return count * rank // ranks, count * (rank + 1) // ranks


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Probing and compiling C++ operators takes a minute and none is used.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}
    if deepspeed.comm.comm.cdb is None:
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed
