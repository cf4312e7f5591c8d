"""The training loop on a tiny network: what each step draws, that it learns, and that nothing short of a finished run
changes what a run ends with."""

import math
import os
import random
import re
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.unet import UNet
from ddpm.errors import Stopped, UserError
from ddpm.files import sha256
from ddpm.params import TrainParams
from ddpm.runtime.device import select_device
from ddpm.runtime.run_folder import fingerprint
from ddpm.tensor_files import serialise
from ddpm.training import loop, step, validation
from ddpm.training import state as state_module
from ddpm.training.batches import draw
from ddpm.training.optim import ema_decay, learning_rate, make_optimizers
from ddpm.training.state import load_state, save_state
from ddpm.training.step import Execution
from ddpm.training.validation import preview
from ddpm.training.window import WINDOW
from helpers import CPU, TINY, Recorder, class_images, params

SHAPE, NULL_CLASS = (1, 28, 28), 10
SRC = Path(__file__).resolve().parents[1] / "src"
DATA = class_images()


def run(p: TrainParams, states: Path, log: Recorder | None = None, state_seconds: float = 60) -> loop.Trained:
    states.mkdir(parents=True, exist_ok=True)
    return loop.train(p, DATA, states, log or Recorder(), Execution(CPU, state_seconds=state_seconds))


def digest(trained: loop.Trained) -> str:
    """Of the weights of the model and of its guide."""
    return sha256(serialise([part[name].contiguous() for part in (trained.weights, trained.guide) for name in trained.weights]))


@pytest.fixture(scope="module", autouse=True)
def short_previews():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "PREVIEW_STEPS", 4)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks are too small for more, and processes whose results are compared must have as many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nothing interrupts ends with and reports."""
    log = Recorder()
    return run(params(), tmp_path_factory.mktemp("states"), log), log


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**6), batch=st.integers(1, 300), timesteps=st.integers(4, 3000))
def test_a_steps_draws_depend_on_seed_and_step_and_are_stratified(seed, step, batch, timesteps):
    p = params(seed=seed, batch_size=batch, diffusion__timesteps=timesteps)
    torch.manual_seed(1)
    diffusion = Diffusion(**p.diffusion.model_dump())
    indices, t, eps, dropped, mirrored = draw(p, step, 500, SHAPE, diffusion)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = draw(p, step, 500, SHAPE, diffusion)
    assert all(torch.equal(a, b) for a, b in zip((indices, t, eps, dropped, mirrored), again, strict=True))
    assert not mirrored.any()
    with_mirrors = draw(p, step, 500, SHAPE, diffusion, mirror=True)
    assert all(torch.equal(a, b) for a, b in zip((indices, t, eps, dropped), with_mirrors[:4], strict=True))
    assert torch.equal(state, torch.manual_seed(1).get_state())  # it takes nothing from the global generator

    assert indices.shape == t.shape == dropped.shape == (batch,) and eps.shape == (batch, 1, 28, 28)
    assert indices.min() >= 0 and indices.max() < 500
    assert t.min() >= 0 and t.max() < timesteps
    share = np.cumsum(diffusion.weight.double().numpy()) / diffusion.weight.double().sum().item()
    below = np.concatenate([[0.0], share[:-1]])  # timestep t has the quantiles below[t] … share[t]
    for i, timestep in enumerate(t.tolist()):
        assert share[timestep] > i / batch - 1e-6 and below[timestep] < (i + 1) / batch + 1e-6
    assert not torch.equal(eps, draw(p, step + 1, 500, SHAPE, diffusion)[2])
    assert not torch.equal(eps, draw(params(seed=(seed + 1) % 2**32, batch_size=batch), step, 500, SHAPE, diffusion)[2])


def test_half_of_the_images_are_mirrored_where_the_data_set_allows_it():
    """Every image is black on its left and white on its right; the network is shown what it would be shown in training."""
    images = torch.zeros(40, 28, 28, dtype=torch.uint8)
    images[:, :, 14:] = 255
    data = replace(DATA, images=images, labels=torch.zeros(40, dtype=torch.int64), mirror=True)
    p = params(batch_size=400)
    diffusion = Diffusion(**p.diffusion.model_dump())
    shown = []
    training_step = step.TrainStep(p, data, diffusion, state_module.TrainingState.initial(p, data, CPU), Execution(CPU))
    training_step.diffusion = SimpleNamespace(
        q_sample=lambda x0, t, eps: shown.append(x0) or diffusion.q_sample(x0, t, eps),
        squared_error=diffusion.squared_error,
        mean_weight=diffusion.mean_weight,
    )
    drawn = draw(p, 0, 40, SHAPE, diffusion, mirror=True)
    training_step(0, drawn)
    left = shown[0][:, 0, :, :14].mean((1, 2))
    assert torch.equal(left, torch.where(drawn.mirrored, 1.0, -1.0))
    assert 150 < drawn.mirrored.sum() < 250


def test_muon_has_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = UNet(**params().model.model_dump())
    names = {id(w): name for name, w in model.named_parameters()}
    adamw, muon = ([names[id(w)] for g in o.param_groups for w in g["params"]] for o in make_optimizers(params(), model))
    assert sorted(adamw + muon) == sorted(names.values())
    assert {"down.0.0.0.conv1.weight", "middle_attention.qkv.weight", "up.1.0.0.condition.weight"} <= set(muon)
    assert {"stem.weight", "head.weight", "embed_class.weight", "upsample.0.weight", "middle1.conv1.bias"} <= set(adamw)
    (only,) = make_optimizers(params(optimizer="adamw"), model)
    assert len(only.param_groups[0]["params"]) == len(names)


@pytest.mark.parametrize("gamma", [5.0, None])
def test_images_are_drawn_uniformly_and_timesteps_as_their_weights(gamma):
    p = params(batch_size=10, diffusion__timesteps=20, diffusion__min_snr_gamma=gamma)
    diffusion = Diffusion(**p.diffusion.model_dump())
    draws = [draw(p, step, 50, SHAPE, diffusion) for step in range(4000)]
    timesteps = torch.cat([t for _, t, *_ in draws]).bincount(minlength=20)
    weights = diffusion.weight / diffusion.weight.sum()
    assert (timesteps / 40_000).tolist() == pytest.approx(weights.tolist(), rel=0.05, abs=2e-3)
    images = torch.cat([indices for indices, *_ in draws]).bincount(minlength=50)
    assert (images / 40_000).tolist() == pytest.approx([1 / 50] * 50, rel=0.15)
    eps = torch.cat([eps for _, _, eps, *_ in draws[:100]])
    assert eps.mean().item() == pytest.approx(0, abs=0.01)
    assert eps.std().item() == pytest.approx(1, abs=0.01)


def test_the_training_loss_estimates_the_weighted_loss():
    """Importance sampling leaves the mean: errors at drawn timesteps, against losses summed over all timesteps."""
    p = params(batch_size=64, diffusion__timesteps=50)
    diffusion = Diffusion(**p.diffusion.model_dump())
    x0, eps = torch.randn(2, 50, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    output = torch.zeros_like(x0)
    every = diffusion.weighted_loss(output, x0, torch.arange(50), eps).mean().item()
    t = torch.cat([draw(p, step, 500, SHAPE, diffusion)[1] for step in range(100)])
    estimate = diffusion.squared_error(output[t], x0[t], t, eps[t]).mean().item() * diffusion.mean_weight
    assert estimate == pytest.approx(every, rel=0.01)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_as_often_as_asked(share):
    p = params(batch_size=100, label_dropout=share)
    diffusion = Diffusion(**p.diffusion.model_dump())
    dropped = torch.cat([draw(p, step, 500, SHAPE, diffusion)[3] for step in range(200)]).float().mean().item()
    assert dropped == pytest.approx(share, abs=0.01)
    if share in (0, 1):
        assert dropped == share


def test_learning_rate_warms_up_linearly_and_falls_to_zero():
    p = params(steps=1000, warmup_steps=100, learning_rate=0.002)
    rates = [learning_rate(p, step) for step in range(1000)]
    assert rates[:100] == pytest.approx([0.002 * (step + 1) / 100 for step in range(100)])
    assert max(rates) == rates[99] == rates[100] == pytest.approx(0.002)
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert rates[550] == pytest.approx(0.001)  # half-way down
    assert rates[-1] == pytest.approx(0.002 / 900)


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 500), warmup=st.integers(0, 600))
def test_learning_rate_is_positive_and_at_most_its_peak_at_every_step(steps, warmup):
    p = params(steps=steps, warmup_steps=warmup, learning_rate=0.01)
    rates = [learning_rate(p, step) for step in range(steps)]
    assert all(0 < rate <= 0.01 * (1 + 1e-12) for rate in rates)


def test_ema_decay_grows_to_its_limit():
    p = params(ema_decay=0.999)
    decays = [ema_decay(p, step) for step in range(20_000)]
    assert decays[0] == pytest.approx(0.1)
    assert decays[90] == pytest.approx(0.91)
    assert all(a <= b for a, b in pairwise(decays))
    assert decays[8989] < 0.999 == decays[9000] == decays[-1]


def test_the_weights_are_a_moving_average_of_the_models(tmp_path):
    """With no decay they are the model itself; with some, they lag behind it."""
    for decay, equal in ((0.0, True), (0.9, False)):
        trained = run(params(steps=WINDOW, ema_decay=decay), tmp_path / str(decay), state_seconds=0)
        model = load_state(tmp_path / str(decay))["model"]
        assert all(torch.allclose(w, model[name], atol=1e-6) for name, w in trained.weights.items()) is equal


def test_the_guide_is_the_average_after_a_fifth_of_the_steps(tmp_path):
    p = params(steps=3 * WINDOW + 6)  # not at the end of a window
    assert loop.guide_step(p) == 7
    until_then = []

    class Spy(step.TrainStep):
        def __call__(self, s, drawn):
            result = super().__call__(s, drawn)
            if s + 1 == 7:
                until_then.append({name: w.clone() for name, w in self.state.ema.state_dict().items()})
            return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "TrainStep", Spy)
        trained = run(p, tmp_path)
    assert all(torch.equal(trained.guide[name], w) for name, w in until_then[0].items())
    assert not all(torch.equal(trained.guide[name], w) for name, w in trained.weights.items())
    assert loop.guide_step(params(steps=1)) == 1


@pytest.mark.slow
def test_it_learns(tmp_path):
    p = params(steps=200, learning_rate=0.01, ema_decay=0.95, report_every=100, model__dropout=0.0)
    trained = run(p, tmp_path)
    losses = [row["loss"] for row in trained.validation_curve]
    assert [row["step"] for row in trained.validation_curve] == [0, 100, 200]
    assert losses[2] < losses[0] / 5
    assert trained.train_curve[-1]["loss"] < trained.train_curve[0]["loss"] / 3


def test_what_a_run_reports(whole):
    trained, log = whole
    p = params()
    steps = {name: sorted(s for n, s in log.values if n == name) for name, _ in log.values}
    assert steps["train/loss"] == list(range(1, p.steps + 1))
    windows = list(range(WINDOW, p.steps + 1, WINDOW))
    for name in ("train/learning_rate", "train/grad_norm", "train/images_per_second"):
        assert steps[name] == windows
    assert steps["val/loss"] == sorted(log.previews) == [0, 30, 60]
    assert [row["step"] for row in trained.train_curve] == windows
    for row in trained.train_curve:
        window = [log.values["train/loss", s] for s in range(row["step"] - WINDOW + 1, row["step"] + 1)]
        assert row["loss"] == pytest.approx(sum(window) / WINDOW)
        assert row["learning_rate"] == log.values["train/learning_rate", row["step"]] == learning_rate(p, row["step"] - 1)
    for row in trained.validation_curve:
        buckets = [row[f"loss_quarter{q}"] for q in (1, 2, 3, 4)]
        assert row["loss"] == pytest.approx(sum(buckets) / 4)  # of equal size
    for images in log.previews.values():
        assert images.shape == (40, 28, 28) and images.dtype == torch.uint8
    assert not torch.equal(log.previews[0], log.previews[60])


@pytest.mark.parametrize(("every", "steps"), [(25, [0, 30, 50, 60]), (7, [0, 10, 20, 30]), (100, [0, 20])])
def test_reports_come_with_the_next_look_at_the_losses(tmp_path, every, steps):
    assert [row["step"] for row in run(params(report_every=every, steps=steps[-1]), tmp_path).validation_curve] == steps


def test_a_last_window_that_is_not_whole(tmp_path):
    log = Recorder()
    trained = run(params(steps=WINDOW + 3), tmp_path, log)
    assert [row["step"] for row in trained.train_curve] == [WINDOW, WINDOW + 3]
    last = [log.values["train/loss", s] for s in range(WINDOW + 1, WINDOW + 4)]
    assert trained.train_curve[-1]["loss"] == pytest.approx(sum(last) / 3)
    assert [row["step"] for row in trained.validation_curve] == [0, WINDOW + 3]


def test_states_are_never_ahead_of_the_synced_journal(tmp_path, monkeypatch):
    log, saved = Recorder(), []

    def save(_folder: Path, step: int, _state: dict) -> None:
        saved.append((step, log.synced, len(log.values)))

    monkeypatch.setattr(state_module, "save_state", save)
    run(params(), tmp_path, log, state_seconds=0)
    assert [step for step, _, _ in saved] == list(range(WINDOW, 61, WINDOW))
    assert all(synced == reported for _, synced, reported in saved)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, whole, number, status):
    trained, log = whole
    windows = sorted(random.Random(status).sample(range(1, 6), 2))
    reported, previews = {}, {}
    before = signal.getsignal(number)
    for window in windows:
        part = Recorder(window * WINDOW, number)
        message = f"Stopped after step {window * WINDOW}. Run the same command again to resume."
        with pytest.raises(Stopped, match=f"^{re.escape(message)}$") as stopped:
            run(params(), tmp_path, part)
        assert stopped.value.exit_status == status
        assert signal.getsignal(number) is before
        reported, previews = reported | part.without_speed(), previews | part.previews
    part = Recorder()
    resumed = run(params(), tmp_path, part)
    assert digest(resumed) == digest(trained)
    assert resumed.train_curve == trained.train_curve
    assert resumed.validation_curve == trained.validation_curve
    assert reported | part.without_speed() == log.without_speed()
    assert min(step for _, step in part.values) == windows[-1] * WINDOW + 1  # nothing was computed again
    assert all(torch.equal(images, log.previews[step]) for step, images in (previews | part.previews).items())


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Impatient(Recorder):
        def metrics(self, step: int, values: dict[str, float]) -> None:
            super().metrics(step, values)
            if (step, len(values)) == (WINDOW, 1) and "train/loss" in values:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=r"^Stopped. Run the same command again to resume.$"):
        run(params(), tmp_path, Impatient())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, whole, capsys):
    trained, _ = whole
    with pytest.raises(Stopped):
        run(params(), tmp_path, Recorder(40), state_seconds=0)
    states = sorted(tmp_path.glob("state-*.pt"))
    assert [int(re.search(r"\d+", path.name)[0]) for path in states] == [30, 40]
    data = bytearray(states[-1].read_bytes())
    data[len(data) // 2] ^= 1
    states[-1].write_bytes(data)
    assert load_state(tmp_path)["step"] == 30
    assert digest(run(params(), tmp_path)) == digest(trained)
    assert f"warning: {states[-1]} is corrupt; falling back to the state before it" in capsys.readouterr().err


def test_with_every_state_damaged_it_begins_again(tmp_path, whole):
    with pytest.raises(Stopped):
        run(params(), tmp_path, Recorder(20))
    for path in tmp_path.glob("state-*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    log = Recorder()
    assert digest(run(params(), tmp_path, log)) == digest(whole[0])
    assert ("train/loss", 1) in log.values


def poisoned_state(folder: Path, p: TrainParams, stop_at: int, label: int) -> None:
    """The state of a run so far, with one class's embedding finite, but too large to compute with."""
    with pytest.raises(Stopped):
        run(p, folder, Recorder(stop_at))
    state = load_state(folder)
    state["model"]["embed_class.weight"][label] = 1e38
    for path in folder.glob("state-*.pt"):
        path.unlink()
    save_state(folder, state["step"], state)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_infinite_loss_is_neither_saved_nor_logged(tmp_path, optimizer):
    p, label, start = params(steps=200, label_dropout=0.5, report_every=1000, optimizer=optimizer), 7, 20
    poisoned_state(tmp_path, p, start, label)

    diffusion = Diffusion(**p.diffusion.model_dump())

    def meets(step: int) -> bool:
        batch, _, _, dropped, _ = draw(p, step, len(DATA.images), SHAPE, diffusion)
        return bool(((DATA.labels[batch] == label) & ~dropped).any())

    bad = next(step for step in range(start, p.steps) if meets(step))
    line = (
        f"training stopped at step {bad}: the loss or its gradient is not finite (learning rate "
        f"{learning_rate(p, bad):.2g}); lower train.learning_rate or raise train.warmup_steps"
    )
    log = Recorder()
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        run(p, tmp_path, log)
    assert all(math.isfinite(value) for value in log.values.values())
    state = load_state(tmp_path)
    assert state["step"] <= bad
    assert all(w.isfinite().all() for name in ("model", "ema") for w in state[name].values())


def test_labels_never_seen_are_never_learned(tmp_path):
    p = params(label_dropout=1.0, weight_decay=0.0, steps=WINDOW, model__dropout=0.0)
    torch.manual_seed(p.seed)
    before = UNet(**p.model.model_dump()).embed_class.weight
    after = run(p, tmp_path).weights["embed_class.weight"]
    assert torch.equal(after[:NULL_CLASS], before[:NULL_CLASS])
    assert not torch.equal(after[NULL_CLASS], before[NULL_CLASS])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_model_without_classes_is_validated_with_the_null_class(tmp_path, share):
    p = params(label_dropout=share, steps=WINDOW, model__dropout=0.0)
    diffusion, model = Diffusion(**p.diffusion.model_dump()), UNet(**p.model.model_dump()).eval()
    model.load_state_dict(run(p, tmp_path).weights)
    images, losses = preview(p, model, diffusion), validation.validate(p, model, diffusion, DATA)
    with torch.no_grad():
        model.embed_class.weight[:NULL_CLASS] = 10
    unlabelled = share == 1
    assert torch.equal(preview(p, model, diffusion), images) is unlabelled
    assert (validation.validate(p, model, diffusion, DATA) == losses) is unlabelled


def test_the_fingerprint_changes_with_every_parameter():
    changes = {
        "seed": 4, "steps": 61, "batch_size": 9, "optimizer": "adamw", "learning_rate": 0.004, "warmup_steps": 11,
        "weight_decay": 0.02, "ema_decay": 0.8, "label_dropout": 0.2, "precision": "bfloat16",
        "report_every": 31, "model__patch_size": 1, "model__channels": [8, 8], "model__blocks": 2, "model__attention": [14],
        "model__heads": 4,
        "model__dropout": 0.2, "diffusion__timesteps": 21, "diffusion__schedule": "linear", "diffusion__prediction": "eps",
        "diffusion__min_snr_gamma": None,
    }  # fmt: skip
    leaves = {f"{s}__{k}" for s in ("model", "diffusion") for k in TINY[s]} | {k for k, v in TINY.items() if type(v) is not dict}
    assert set(changes) == leaves
    no_attention = {"model__patch_size": {"model__attention": []}}
    changed = [params(**{change: value}, **no_attention.get(change, {})) for change, value in changes.items()]
    assert len({fingerprint(p.model_dump(), []) for p in (params(), *changed)}) == len(changes) + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_graphs_have_the_losses_of_eager(tmp_path):
    device, p = torch.device("cuda"), params(model__dropout=0.0)
    assert p.steps * p.batch_size < step.WORTH_FUSING
    logs = []
    for compile_model in (False, True):
        (states := tmp_path / str(compile_model)).mkdir()
        loop.train(p, DATA.to(device), states, log := Recorder(), Execution(device, compile_model))
        logs.append({step: value for (name, step), value in log.values.items() if name == "train/loss"})
    eager, graphs = logs
    assert graphs == pytest.approx(eager, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_an_interrupted_run_on_cuda_ends_with_the_same_bytes(tmp_path):
    device, digests = select_device("cuda"), []
    for stop_at in (None, 30):
        (states := tmp_path / str(stop_at)).mkdir()
        data, execution = DATA.to(device), Execution(device, compile_model=True)
        if stop_at:
            with pytest.raises(Stopped):
                loop.train(params(), data, states, Recorder(stop_at), execution)
        digests.append(digest(loop.train(params(), data, states, Recorder(), execution)))
    assert digests[0] == digests[1]


def test_short_trainings_on_cuda_are_not_fused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: options)
    cuda, short, long = torch.device("cuda"), step.WORTH_FUSING - 1, step.WORTH_FUSING
    assert step.compiled(None, True, short, cuda) == {"backend": "cudagraphs"}
    assert step.compiled(None, True, long, cuda) == {"mode": "reduce-overhead"}
    assert step.compiled(None, False, short, cuda) == {"mode": "default"}
    assert step.compiled(None, True, short, CPU) == {"mode": "reduce-overhead"}
