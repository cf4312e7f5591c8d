"""The training loop. It reads top to bottom: draw, step, window, validate, save."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from tqdm import tqdm

from ddpm.data.dataset import Dataset
from ddpm.diffusion.process import Diffusion
from ddpm.errors import Stopped, UserError
from ddpm.params import TrainParams
from ddpm.runtime.cli import stop_signals
from ddpm.training.batches import Batches
from ddpm.training.state import TrainingState
from ddpm.training.step import Execution, TrainStep
from ddpm.training.validation import preview, validate
from ddpm.training.window import Window


class Log(Protocol):
    """Where the loop reports to. Reporting changes nothing that the loop computes."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def preview(self, step: int, images: Tensor) -> None:
        """Images uint8 [N, …], as `validation.preview` draws them."""
        ...

    def sync(self) -> None:
        """Return when everything reported so far would survive a power cut."""
        ...


@dataclass
class Trained:
    weights: dict[str, Tensor]  # the moving average (EMA)
    guide: dict[str, Tensor]  # the same average after a fifth of the steps, which guidance leads away from
    train_curve: list[dict[str, float]]  # one row per window
    validation_curve: list[dict[str, float]]  # one row per validation


class NoLog:
    """The log of all ranks but rank 0."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def preview(self, step: int, images: Tensor) -> None: ...

    def sync(self) -> None: ...


def train(p: TrainParams, data: Dataset, folder: Path, log: Log, execution: Execution) -> Trained:
    """Train for `p.steps` steps, resuming from the newest state in `folder` if there is one.

    What step s draws depends on (p.seed, s) alone, so an interrupted and resumed run gives the same result. Of several
    processes only rank 0 reads and writes states, and logs. Raises UserError if a loss or gradient isn't finite (before a state
    is saved), and Stopped on SIGTERM or Ctrl-C, after rank 0 has saved a state; on a second Ctrl-C it doesn't wait for that.
    """
    group, device = execution.group, execution.device
    try:
        p.check(group.world_size, execution.accumulate)  # torchrun may have started more processes than params.yaml says
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    diffusion = Diffusion(**p.diffusion.model_dump()).to(device)
    state = TrainingState.initial(p, data, device)
    state.resume(folder, group)
    train_step = TrainStep(p, data, diffusion, state, execution)
    window = Window(p, device, group)

    with (
        stop_signals() as stop,
        tqdm(total=p.steps, initial=state.step, unit="step", desc="train", dynamic_ncols=True, disable=not group.is_main) as bar,
        Batches(p, data, diffusion, device, group, first_step=state.step) as batches,
    ):
        if state.step == 0 and group.is_main:
            log_validation(p, state, diffusion, data, log)
        saved_at = time.monotonic()
        window.begin()
        for step in range(state.step, p.steps):
            loss, grad_norm = train_step(step, batches.next())
            window.add(step, loss, grad_norm)
            state.step = step + 1
            if state.step == guide_step(p):
                state.guide = {name: w.to("cpu", copy=True) for name, w in state.ema.state_dict().items()}
            if not window.is_complete(step):
                continue
            stopping = window.close(stop)
            if not group.is_main:
                if stopping:
                    raise Stopped(signal.SIGTERM)
                continue
            log_window(state, window, bar, log)
            if window.reaches(p.report_every):
                log_validation(p, state, diffusion, data, log)
            stopping = stopping or (group.world_size == 1 and bool(stop))  # several processes stop together, one window later
            if stopping or time.monotonic() - saved_at > execution.state_seconds:
                log.sync()  # or the state could be ahead of what the log knows after a power cut
                state.save(folder)
                saved_at = time.monotonic()
            if stopping:
                number = stop[0] if stop else signal.SIGTERM
                raise Stopped(number, f"Stopped after step {state.step}. Run the same command again to resume.")
            window.begin()
    return Trained(state.ema.state_dict(), state.guide, state.train_curve, state.validation_curve)


def guide_step(p: TrainParams) -> int:
    """The step after which the moving average becomes the guide: a fifth of all, at least one."""
    return max(1, p.steps // 5)


def log_window(state: TrainingState, window: Window, bar: tqdm, log: Log) -> None:
    """Log a complete window (the loss of every step, the rest once), append it to the curve, and move the bar."""
    row = window.row()
    state.train_curve.append(row)
    for step, loss in zip(window.steps, window.losses, strict=True):
        log.metrics(step + 1, {"train/loss": loss})
    log.metrics(state.step, {f"train/{name}": row[name] for name in ("learning_rate", "grad_norm")})
    log.metrics(state.step, {"train/images_per_second": window.images_per_second})
    bar.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{window.images_per_second:.0f}", refresh=False)
    bar.update(state.step - bar.n)


def log_validation(p: TrainParams, state: TrainingState, diffusion: Diffusion, data: Dataset, log: Log) -> None:
    """Log the validation loss and a small grid of samples, both from the moving average of the weights; append to the curve."""
    row = {"step": state.step, **validate(p, state.ema, diffusion, data)}
    state.validation_curve.append(row)
    log.metrics(state.step, {f"val/{name}": value for name, value in row.items() if name != "step"})
    log.preview(state.step, preview(p, state.ema, diffusion))
