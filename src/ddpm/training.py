"""The training loop: batches, loss, optimiser, EMA, validation, in-training samples, resume."""

import copy
import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpm.data import Data, to_model_range, to_uint8
from ddpm.diffusion import Diffusion, generator
from ddpm.distributed import ALONE, Group
from ddpm.muon import Muon
from ddpm.params import Stopped, TrainParams, UserError
from ddpm.resume import load_state, save_state
from ddpm.samplers import ImageNoise, generate
from ddpm.unet import Attention, ResBlock, UNet

WINDOW = 10  # steps between looks at the loss: the host waits for the device no more often
STATE_SECONDS = 60  # between two saved training states; when they are saved changes no result
VALIDATION_IMAGES = 1000
VALIDATION_SEED = 0  # the same noise for every run, so that runs with other seeds compare
BUCKETS = 4  # quarters of the timesteps, for the validation loss
PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_STEPS = 4, 10, 20
GRAD_CLIP = 1.0  # the largest norm of the gradient
WORTH_FUSING = 1_700_000  # images: fewer, and fused kernels don't win back half a minute of compiling (default model, H200)


class Log(Protocol):
    """Where the loop reports to; it changes nothing that the loop computes."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def preview(self, step: int, images: Tensor) -> None: ...

    def sync(self) -> None:
        """Return when a power cut can't undo what was reported."""
        ...


@dataclass
class Trained:
    weights: dict[str, Tensor]  # EMA
    train_curve: list[dict[str, float]]  # a row every WINDOW steps, means over the window
    validation_curve: list[dict[str, float]]  # a row at the first window's end after every `report_every` steps


def train(
    p: TrainParams,
    data: Data,
    device: torch.device,
    states: Path | None,
    log: Log | None,
    compile_model: bool,
    group: Group = ALONE,
    accumulate: int = 1,
) -> Trained:
    """Train for `p.steps` steps, from the newest state in `states` if there is one.

    What step s draws depends on (p.seed, s) alone, so the result is the same whether or not the run was interrupted. Every
    process of `group` computes its share of a batch, in `accumulate` parts one after the other; only the first has states
    and a log. Neither number changes more than rounding, but for where dropout strikes. Raises UserError when a loss or
    gradient isn't finite (before a state is saved) and Stopped on SIGTERM or Ctrl-C.
    """
    try:
        p.check(group.size, accumulate)  # the user's torchrun may have started more than params.yaml knows of
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    torch.manual_seed(p.seed)  # initial weights
    model = UNet(**architecture(p, data)).to(device, memory_format=torch.channels_last)
    diffusion = Diffusion(**p.diffusion.model_dump()).to(device)
    parameters = list(model.parameters())
    optimizers = make_optimizers(p, model)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    ema_parameters = list(ema.parameters())
    start, train_curve, validation_curve = 0, [], []

    if state := group.from_first(load_state(states) if group.first else None):
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        start, train_curve, validation_curve = state["step"], state["train_curve"], state["validation_curve"]

    network = group.wrap(model)
    if compile_model:
        network = compiled(network, graphs=group.size == 1 and accumulate == 1, images=p.steps * p.batch_size, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(p, device))
    losses, norms = torch.zeros(WINDOW, device=device), torch.zeros(WINDOW, device=device)
    saved_at = time.monotonic()

    def drawn_for(step: int) -> list[Tensor]:
        drawn = [group.share(x) for x in draw(p, step, len(data.images), data.image_shape, diffusion)]
        return [x.pin_memory() for x in drawn] if device.type == "cuda" else drawn  # then the copy doesn't wait for the device

    with (
        stop_signals() as stop,
        tqdm(total=p.steps, initial=start, unit="step", desc="train", dynamic_ncols=True, disable=not group.first) as bar,
        ThreadPoolExecutor(1) as ahead,  # draws while a GPU is given its work, which takes the host about as long
    ):
        upcoming = ahead.submit(drawn_for, start)
        if start == 0 and group.first:
            report(p, 0, ema, diffusion, data, validation_curve, log)
        window_began = time.monotonic()
        for step in range(start, p.steps):
            set_learning_rate(optimizers, learning_rate(p, step))
            drawn = upcoming.result()
            upcoming = ahead.submit(drawn_for, step + 1)
            places = (data.images.device, device, device, device)
            drawn = [x.to(place, non_blocking=device.type == "cuda") for x, place in zip(drawn, places, strict=True)]

            model.zero_grad()  # before the forward pass, so that CUDA graphs find their memory free
            if p.model.dropout:
                torch.manual_seed(generator(p.seed, f"dropout {group.rank}" if group.rank else "dropout", step).initial_seed())
            loss = torch.zeros((), device=device)
            for part in range(accumulate):
                batch, t, eps, dropped = (Group(part, accumulate).share(x) for x in drawn)
                with nullcontext() if group.size == 1 or part == accumulate - 1 else network.no_sync():
                    with autocast:
                        x0, labels = to_model_range(data.images[batch].to(device)), data.labels[batch].to(device)
                        mean = batch_loss(network, diffusion, x0, labels.masked_fill(dropped, model.null_class), t, eps)
                    share = mean * (len(batch) * group.size / p.batch_size)  # averaged over the processes: of the whole batch
                    share.backward()
                loss += share.detach()
            norm = torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(ema_parameters, parameters, 1 - ema_decay(p, step))
            losses[step % WINDOW], norms[step % WINDOW] = loss, norm

            done = step + 1
            if done % WINDOW and done < p.steps:
                continue
            steps = range(step // WINDOW * WINDOW, done)
            shared = group.average(torch.cat([losses, losses.new_tensor([len(stop)])]))
            losses, stopping = shared[:-1], shared[-1].item() > 0
            window, window_norms = losses[: len(steps)].tolist(), norms[: len(steps)].tolist()
            for s, value in zip(steps, map(sum, zip(window, window_norms, strict=True)), strict=True):
                if not math.isfinite(value):
                    raise not_finite(p, s)
            if not group.first:
                if stopping:
                    raise Stopped(signal.SIGTERM)
                continue
            row = {"step": done, "loss": sum(window) / len(window), "learning_rate": learning_rate(p, step)}
            row["grad_norm"] = sum(window_norms) / len(window_norms)
            train_curve.append(row)
            images_per_second = len(steps) * p.batch_size / (time.monotonic() - window_began)
            for s, value in zip(steps, window, strict=True):
                log.metrics(s + 1, {"train/loss": value})
            log.metrics(done, {f"train/{k}": row[k] for k in ("learning_rate", "grad_norm")})
            log.metrics(done, {"train/images_per_second": images_per_second})
            bar.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{images_per_second:.0f}", refresh=False)
            bar.update(done - bar.n)

            if done // p.report_every > steps.start // p.report_every or done == p.steps:
                report(p, done, ema, diffusion, data, validation_curve, log)
            stopping = stopping or (group.size == 1 and bool(stop))  # several stop together, at the next look
            if stopping or time.monotonic() - saved_at > STATE_SECONDS:
                log.sync()  # or the state could be ahead of what is known of the steps before it
                save_state(
                    states,
                    done,
                    {
                        "step": done,
                        "model": model.state_dict(),
                        "ema": ema.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "train_curve": train_curve,
                        "validation_curve": validation_curve,
                    },
                )
                saved_at = time.monotonic()
            if stopping:
                raise Stopped(
                    stop[0] if stop else signal.SIGTERM, f"stopped after step {done}; the same command goes on from there"
                )
            window_began = time.monotonic()
    return Trained(ema.state_dict(), train_curve, validation_curve)


def compiled(network: nn.Module, graphs: bool, images: int, device: torch.device) -> nn.Module:
    """The network, compiled as pays for training on so many images.

    `graphs`: with CUDA graphs, which admit neither other processes' gradients nor those of another part of a batch.
    """
    if graphs and device.type == "cuda" and images < WORTH_FUSING:
        return torch.compile(network, backend="cudagraphs")  # PyTorch's own kernels, ready in seconds
    return torch.compile(network, mode="reduce-overhead" if graphs else "default")


def not_finite(p: TrainParams, step: int) -> UserError:
    return UserError(
        f"training stopped at step {step}: the loss or its gradient is not finite (learning rate {learning_rate(p, step):.2g}); "
        "lower train.learning_rate or raise train.warmup_steps"
    )


def use_bfloat16(p: TrainParams, device: torch.device) -> bool:
    """`auto`: where the device computes in it; some older GPUs only imitate it, slowly."""
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return p.precision == "bfloat16" or (p.precision == "auto" and supported)


def architecture(p: TrainParams, data: Data) -> dict:
    """What makes the U-Net for this data set. Raises UserError where none can be made."""
    channels, size, _ = data.image_shape
    try:
        p.model.check(size)
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    return {**p.model.model_dump(), "classes": len(data.classes), "image_size": size, "image_channels": channels}


def draw(
    p: TrainParams, step: int, images: int, shape: tuple[int, int, int], diffusion: Diffusion
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What training step `step` draws, from (seed, step) alone, on the CPU.

    Indices int64 [B] of images, timesteps int64 [B], noise float [B, *shape], and which labels are dropped, bool [B].
    Two things make the loss less noisy and leave its mean: timesteps are drawn as often as the loss weights them, instead of
    evenly and then weighted (importance sampling), and stratified, one from each B-th of their distribution (Kingma et al.
    2021, app. I.1).
    """
    g = generator(p.seed, "train", step)
    batch = torch.randint(images, (p.batch_size,), generator=g)
    strata = (torch.arange(p.batch_size) + torch.rand(p.batch_size, generator=g)) / p.batch_size
    t = diffusion.timesteps_at(strata)
    eps = torch.randn(p.batch_size, *shape, generator=g)
    dropped = torch.rand(p.batch_size, generator=g) < p.label_dropout
    return batch, t, eps, dropped


def batch_loss(network: nn.Module, diffusion: Diffusion, x0: Tensor, labels: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The loss of a step on images float [B, C, H, W] and classes int64 [B], with timesteps and noise as `draw` gives them."""
    x_t = diffusion.q_sample(x0, t, eps).contiguous(memory_format=torch.channels_last)
    output = network(x_t, t, labels)
    return diffusion.errors(output, x0, t, eps).mean() * diffusion.mean_weight


def learning_rate(p: TrainParams, step: int) -> float:
    """Linear warm-up, then a straight line down to zero after the last step."""
    if step < p.warmup_steps:
        return p.learning_rate * (step + 1) / p.warmup_steps
    return p.learning_rate * (p.steps - step) / max(p.steps - p.warmup_steps, 1)


def make_optimizers(p: TrainParams, model: UNet) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the weight matrices inside the blocks and AdamW for the rest."""
    inside = [w for m in model.modules() if isinstance(m, ResBlock | Attention) for w in m.parameters() if w.ndim > 1]
    matrices = set(inside) if p.optimizer == "muon" else set()
    rest = [w for w in model.parameters() if w not in matrices]
    adamw = torch.optim.AdamW(rest, lr=p.learning_rate, betas=(0.9, 0.99), weight_decay=p.weight_decay, fused=True)
    return [adamw, Muon(inside, p.learning_rate, weight_decay=p.weight_decay)] if matrices else [adamw]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


def ema_decay(p: TrainParams, step: int) -> float:
    """The decay at `step`: young averages forget faster, so that the random start doesn't linger."""
    return min(p.ema_decay, (1 + step) / (10 + step))


def report(
    p: TrainParams, done: int, ema: UNet, diffusion: Diffusion, data: Data, validation_curve: list[dict[str, float]], log: Log
) -> None:
    """The validation loss and a small grid of samples, both from the EMA weights, after `done` steps."""
    row = {"step": done, **validate(p, ema, diffusion, data)}
    validation_curve.append(row)
    log.metrics(done, {f"val/{name}": value for name, value in row.items() if name != "step"})
    log.preview(done, preview(p, ema, diffusion))


@torch.inference_mode()
def validate(p: TrainParams, model: UNet, diffusion: Diffusion, data: Data) -> dict[str, float]:
    """The loss on the first test images with fixed noise and timesteps, all of it and by quarter of the timesteps."""
    device, n = next(model.parameters()).device, min(VALIDATION_IMAGES, len(data.test_images))
    g = generator(VALIDATION_SEED, "validation", 0)
    eps = torch.randn(n, *data.image_shape, generator=g)
    t = torch.arange(n) * diffusion.timesteps // n
    t = t[torch.randperm(n, generator=g)]  # or the sorted timesteps would meet the images in the test set's order
    unlabelled = p.label_dropout == 1
    losses = []
    for rows in torch.arange(n).split(250):
        x0, times = to_model_range(data.test_images[rows].to(device)), t[rows].to(device)
        labels = data.test_labels[rows].to(device)
        labels = torch.full_like(labels, model.null_class) if unlabelled else labels
        noise = eps[rows].to(device)
        losses.append(diffusion.losses(model(diffusion.q_sample(x0, times, noise), times, labels), x0, times, noise).cpu())
    losses, bucket = torch.cat(losses), t * BUCKETS // diffusion.timesteps
    by_bucket = {f"loss_quarter{b + 1}": losses[bucket == b].mean().item() for b in range(BUCKETS)}
    return {"loss": losses.mean().item(), **by_bucket}


def preview(p: TrainParams, model: UNet, diffusion: Diffusion) -> Tensor:
    """A few samples of every class, uint8 [PREVIEW_ROWS * columns, …], at most PREVIEW_COLUMNS: column c is class c."""
    device = next(model.parameters()).device
    labels = torch.arange(min(model.null_class, PREVIEW_COLUMNS) or PREVIEW_COLUMNS, device=device).repeat(PREVIEW_ROWS)
    if p.label_dropout == 1 or model.null_class == 0:
        labels = torch.full_like(labels, model.null_class)
    noise = ImageNoise(VALIDATION_SEED, 0, len(labels), model.image_shape, device)
    steps = min(PREVIEW_STEPS, diffusion.timesteps)
    *_, (x, _) = generate(model, diffusion, labels, model.null_class, noise, "ddim", steps)
    return to_uint8(x).cpu()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C append to, so that the loop stops between two steps; a second Ctrl-C stops it at once."""
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise Stopped(number)
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
