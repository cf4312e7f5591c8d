"""The training loop: batches, loss, optimiser, EMA, validation, in-training samples, resume."""

import copy
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.data.dataset import Dataset
from ddpm.data.pixels import to_model_range
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import seeded_rng
from ddpm.diffusion.unet import UNet
from ddpm.errors import Stopped, UserError
from ddpm.params import TrainParams
from ddpm.runtime.cli import stop_signals
from ddpm.runtime.distributed import SINGLE_PROCESS, Group
from ddpm.training.optim import ema_decay, learning_rate, make_optimizers, set_learning_rate
from ddpm.training.state import load_state, save_state
from ddpm.training.step import architecture, batch_loss, compiled, draw, use_bfloat16
from ddpm.training.validation import Log, report

WINDOW = 10  # steps between looks at the loss: the host waits for the device no more often
STATE_SECONDS = 60  # between two saved training states; when they are saved changes no result
GRAD_CLIP = 1.0  # the largest norm of the gradient


@dataclass
class Trained:
    weights: dict[str, Tensor]  # EMA
    train_curve: list[dict[str, float]]  # a row every WINDOW steps, means over the window
    validation_curve: list[dict[str, float]]  # a row at the first window's end after every `report_every` steps


def train(
    p: TrainParams,
    data: Dataset,
    device: torch.device,
    states: Path | None,
    log: Log | None,
    compile_model: bool,
    group: Group = SINGLE_PROCESS,
    accumulate: int = 1,
) -> Trained:
    """Train for `p.steps` steps, from the newest state in `states` if there is one.

    What step s draws depends on (p.seed, s) alone, so the result is the same whether or not the run was interrupted. Every
    process of `group` computes its share of a batch, in `accumulate` parts one after the other; only the first has states
    and a log. Neither number changes more than rounding, but for where dropout strikes. Raises UserError when a loss or
    gradient isn't finite (before a state is saved) and Stopped on SIGTERM or Ctrl-C.
    """
    try:
        p.check(group.world_size, accumulate)  # the user's torchrun may have started more than params.yaml knows of
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

    if state := group.broadcast(load_state(states) if group.is_main else None):
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        start, train_curve, validation_curve = state["step"], state["train_curve"], state["validation_curve"]

    network = group.wrap(model)
    if compile_model:
        graphs = group.world_size == 1 and accumulate == 1
        network = compiled(network, graphs, p.steps * p.batch_size, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(p, device))
    losses, norms = torch.zeros(WINDOW, device=device), torch.zeros(WINDOW, device=device)
    saved_at = time.monotonic()

    def drawn_for(step: int) -> list[Tensor]:
        drawn = [group.shard(x) for x in draw(p, step, len(data.images), data.image_shape, diffusion)]
        return [x.pin_memory() for x in drawn] if device.type == "cuda" else drawn  # then the copy doesn't wait for the device

    with (
        stop_signals() as stop,
        tqdm(total=p.steps, initial=start, unit="step", desc="train", dynamic_ncols=True, disable=not group.is_main) as bar,
        ThreadPoolExecutor(1) as ahead,  # draws while a GPU is given its work, which takes the host about as long
    ):
        upcoming = ahead.submit(drawn_for, start)
        if start == 0 and group.is_main:
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
                torch.manual_seed(seeded_rng(p.seed, f"dropout {group.rank}" if group.rank else "dropout", step).initial_seed())
            loss = torch.zeros((), device=device)
            for part in range(accumulate):
                batch, t, eps, dropped = (Group(part, accumulate).shard(x) for x in drawn)
                with nullcontext() if group.world_size == 1 or part == accumulate - 1 else network.no_sync():
                    with autocast:
                        x0, labels = to_model_range(data.images[batch].to(device)), data.labels[batch].to(device)
                        mean = batch_loss(network, diffusion, x0, labels.masked_fill(dropped, model.null_class), t, eps)
                    share = mean * (len(batch) * group.world_size / p.batch_size)  # the processes' mean is the batch's
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
            shared = group.all_reduce_mean(torch.cat([losses, losses.new_tensor([len(stop)])]))
            losses, stopping = shared[:-1], shared[-1].item() > 0
            window, window_norms = losses[: len(steps)].tolist(), norms[: len(steps)].tolist()
            for s, value in zip(steps, map(sum, zip(window, window_norms, strict=True)), strict=True):
                if not math.isfinite(value):
                    raise not_finite(p, s)
            if not group.is_main:
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
            stopping = stopping or (group.world_size == 1 and bool(stop))  # several stop together, at the next look
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


def not_finite(p: TrainParams, step: int) -> UserError:
    return UserError(
        f"training stopped at step {step}: the loss or its gradient is not finite (learning rate {learning_rate(p, step):.2g}); "
        "lower train.learning_rate or raise train.warmup_steps"
    )
