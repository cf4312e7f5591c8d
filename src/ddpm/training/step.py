"""One optimiser step: forward, backward, clipping, and the update of the weights and of their moving average."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm.data.dataset import Dataset
from ddpm.data.pixels import to_model_range
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import seeded_rng
from ddpm.params import TrainParams
from ddpm.runtime.distributed import SINGLE_PROCESS, Group
from ddpm.training.batches import Draw
from ddpm.training.optim import ema_decay
from ddpm.training.state import TrainingState

GRAD_CLIP = 1.0  # largest norm of the gradient
# With fewer images (steps × batch size) than this, fused kernels save less than the 30 s that compiling takes (default
# model, H200).
WORTH_FUSING = 1_700_000

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t, labels) → prediction


@dataclass(frozen=True)
class Execution:
    """How a training is executed. Nothing here changes more than rounding, except which units dropout drops."""

    device: torch.device
    compile_model: bool = False
    group: Group = SINGLE_PROCESS  # each rank computes its share of a batch
    accumulate: int = 1  # parts of a share that are computed one after the other
    state_seconds: float = 60.0  # between two saved training states


class TrainStep:
    """Call it with a step and its draw; it updates `state` and returns the loss and the gradient's norm, both on the device."""

    def __init__(self, p: TrainParams, data: Dataset, diffusion: Diffusion, state: TrainingState, execution: Execution):
        self.p, self.data, self.diffusion, self.state = p, data, diffusion, state
        self.device, self.group, self.accumulate = execution.device, execution.group, execution.accumulate
        self.parameters: list[Tensor] = list(state.model.parameters())
        self.ema_parameters: list[Tensor] = list(state.ema.parameters())
        self.wrapped = self.group.wrap(state.model)
        self.network: Network = self.wrapped
        if execution.compile_model:
            graphs = self.group.world_size == 1 and self.accumulate == 1
            self.network = compiled(self.wrapped, graphs, p.steps * p.batch_size, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=use_bfloat16(p, self.device))

    def __call__(self, step: int, drawn: Draw) -> tuple[Tensor, Tensor]:
        p, state, rank = self.p, self.state, self.group.rank
        state.optimizers.set_learning_rate(step)
        state.model.zero_grad()  # before the forward pass, so that CUDA graphs find their memory free
        if p.model.dropout:
            torch.manual_seed(seeded_rng(p.seed, f"dropout {rank}" if rank else "dropout", step).initial_seed())
        loss = torch.zeros((), device=self.device)
        for part in range(self.accumulate):
            share = Draw(*(Group(part, self.accumulate).shard(x) for x in drawn))
            with self._synchronisation(is_last=part == self.accumulate - 1):
                part_loss = self._loss(share)
                part_loss.backward()
            loss += part_loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRAD_CLIP)
        state.optimizers.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - ema_decay(p, step))
        return loss, grad_norm

    def _synchronisation(self, is_last: bool) -> AbstractContextManager[None]:
        """Ranks average their gradients only after the last part."""
        return nullcontext() if is_last or not isinstance(self.wrapped, DistributedDataParallel) else self.wrapped.no_sync()

    def _loss(self, drawn: Draw) -> Tensor:
        """The share's part of the batch's mean loss, times the number of ranks, over which gradients are averaged."""
        with self.autocast:
            x0 = to_model_range(self.data.images[drawn.indices].to(self.device))
            if self.data.mirror:
                x0 = torch.where(drawn.mirrored[:, None, None, None], x0.flip(3), x0)
            labels = self.data.labels[drawn.indices].to(self.device)
            labels = labels.masked_fill(drawn.dropped, self.state.model.null_class)
            mean = batch_loss(self.network, self.diffusion, x0, labels, drawn.t, drawn.eps)
        return mean * (len(x0) * self.group.world_size / self.p.batch_size)


def batch_loss(network: Network, diffusion: Diffusion, x0: Tensor, labels: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The mean loss of images float [B, C, H, W] and classes int64 [B], with timesteps and noise as `draw` gives them."""
    x_t = diffusion.q_sample(x0, t, eps).contiguous(memory_format=torch.channels_last)
    output = network(x_t, t, labels)
    return diffusion.squared_error(output, x0, t, eps).mean() * diffusion.mean_weight


def compiled(network: nn.Module, graphs: bool, images: int, device: torch.device) -> Network:
    """The network, compiled in the mode that pays off for a training on this many images.

    `graphs`: use CUDA graphs. They allow neither gradients from other ranks nor from another part of a batch.
    """
    if graphs and device.type == "cuda" and images < WORTH_FUSING:
        return torch.compile(network, backend="cudagraphs")  # PyTorch's own kernels, ready in seconds
    return torch.compile(network, mode="reduce-overhead" if graphs else "default")


def use_bfloat16(p: TrainParams, device: torch.device) -> bool:
    """Whether to compute in bfloat16; `auto` does on devices that have it in hardware. (Older GPUs emulate it, slowly.)"""
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return p.precision == "bfloat16" or (p.precision == "auto" and supported)
