from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import seeded_rng
from helpers import noise_in

DIFFUSERS = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
PREDICTIONS = ["eps", "x0", "v"]
schedules, predictions, seeds = st.sampled_from(sorted(DIFFUSERS)), st.sampled_from(PREDICTIONS), st.integers(0, 2**31)
fractions = st.floats(0, 1)  # of the way from t = 0 to T - 1
gammas = st.sampled_from([None, 0.5, 1.0, 5.0, 20.0])


def images(seed: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def every_timestep(timesteps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image and its noise, float32, for each timestep."""
    return images(0, timesteps).float(), torch.arange(timesteps), images(1, timesteps).float()


@pytest.mark.parametrize("timesteps", [300, 1000])
@pytest.mark.parametrize("schedule", DIFFUSERS)
@pytest.mark.parametrize(("ours", "theirs"), [("q_sample", "add_noise"), ("target", "get_velocity")])
def test_forward_process_and_v_same_as_diffusers(ours, theirs, schedule, timesteps):
    x0, t, eps = every_timestep(timesteps)
    expected = getattr(DDPMScheduler(timesteps, beta_schedule=DIFFUSERS[schedule]), theirs)(x0, eps, t)
    torch.testing.assert_close(getattr(Diffusion(timesteps, schedule, "v"), ours)(x0, t, eps), expected, atol=1e-5, rtol=1e-5)


def test_q_sample_keeps_unit_variance():
    """Of data with unit variance, at every noise level: 4 000 numbers a level, so std is known to 1.1 % (one sigma)."""
    d, t = Diffusion(1000, "cosine", "v"), torch.arange(0, 1000, 50).repeat_interleave(250)
    x = d.q_sample(images(2, len(t)), t, images(3, len(t))).view(20, -1)
    assert (x.std(1) - 1).abs().max() < 0.06
    assert x.mean(1).abs().max() < 0.08


@settings(deadline=None)
@given(schedules, predictions, st.integers(2, 1500), st.lists(fractions, min_size=2, max_size=2), seeds)
def test_the_target_implies_the_image_and_the_noise(schedule, prediction, timesteps, at, seed):
    d = Diffusion(timesteps, schedule, prediction)
    t = torch.tensor([round(f * (timesteps - 1)) for f in at])
    x0, eps = images(seed), images(seed + 1)
    x_t = d.q_sample(x0, t, eps)
    implied_x0 = d.to_x0(d.target(x0, t, eps), x_t, t)
    implied_eps = noise_in(d, implied_x0, x_t, t)
    # the tables' rounding (6e-8) leaves alpha² + sigma² short of 1, which dividing by sigma amplifies
    torch.testing.assert_close(implied_x0, x0, atol=1e-6, rtol=0)
    assert ((implied_eps - eps).abs().amax((1, 2, 3)) < 1e-6 / d.sigma[t]).all()


@settings(deadline=None)
@given(schedules, st.floats(0.1, 20), fractions, seeds)
def test_min_snr_loss_is_the_same_whatever_is_predicted(schedule, gamma, fraction, seed):
    """One error of x̂0, put into each prediction's terms, costs the same under all three."""
    t = torch.full((2,), round(fraction * 900))  # near T, 1 / alpha amplifies the rounding of eps
    x0, eps, guess = images(seed), images(seed + 1), images(seed + 2)
    losses = {}
    for prediction in PREDICTIONS:
        d = Diffusion(1000, schedule, prediction, gamma)
        x_t = d.q_sample(x0, t, eps)
        output = d.target(guess, t, noise_in(d, guess, x_t, t))
        losses[prediction] = d.weighted_loss(output, x0, t, eps)
    torch.testing.assert_close(losses["eps"], losses["x0"], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses["v"], losses["x0"], rtol=1e-3, atol=0)


@settings(deadline=None)
@given(schedules, st.floats(0.1, 20))
def test_min_snr_weights(schedule, gamma):
    """x0's weight is min(SNR, γ), the paper's; γ above every SNR makes eps's loss the plain one."""
    levels = Diffusion(1000, schedule, "x0").alphas_cumprod
    snr = levels / (1 - levels)
    weight = Diffusion(1000, schedule, "x0", gamma).weight.double()
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64)), rtol=1e-5, atol=0)
    assert (Diffusion(1000, schedule, "eps", snr.max().item() + 1).weight == 1).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_uniform_weights_are_ones(prediction):
    d = Diffusion(1000, "cosine", prediction)
    assert d.weight.dtype == torch.float32 and d.weight.tolist() == [1.0] * 1000


@settings(deadline=None)
@given(schedules, predictions, gammas, seeds)
def test_losses_are_each_images_own(schedule, prediction, gamma, seed):
    """[N], zero only where the output is the target, and untouched by the other images of the batch."""
    d, t = Diffusion(50, schedule, prediction, gamma), torch.tensor([0, 20, 49])
    x0, eps, error = images(seed, 3), images(seed + 1, 3), images(seed + 2, 3)
    error[1] = 0
    output = d.target(x0, t, eps) + error
    losses = d.weighted_loss(output, x0, t, eps)
    assert losses.shape == (3,)
    assert losses[1] < 1e-12 and losses[0] > 0 and losses[2] > 0
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(d.weighted_loss(output[one], x0[one], t[one], eps[one]), losses[one])
    torch.testing.assert_close(losses, error.square().mean((1, 2, 3)) * d.weight[t], rtol=1e-3, atol=1e-8, check_dtype=False)


def test_a_bfloat16_output_is_compared_in_float32():
    d, t = Diffusion(1000, "cosine", "v", 5.0), torch.arange(4)
    x0, eps = images(0, 4).float(), images(1, 4).float()
    output = d.target(x0, t, eps).bfloat16()
    assert d.weighted_loss(output, x0, t, eps).dtype == torch.float32
    torch.testing.assert_close(d.weighted_loss(output, x0, t, eps), d.weighted_loss(output.float(), x0, t, eps))


def test_no_two_indices_share_a_seed():
    assert len({seeded_rng(0, "train", i).initial_seed() for i in range(100_000)}) == 100_000


def test_streams_and_seeds_differ():
    """The first 100 000 items of every stream of ten runs are disjoint, so no run samples from noise it trained on."""
    starts = sorted(seeded_rng(seed, stream, 0).initial_seed() for seed in range(10) for stream in ("train", "sample", "dropout"))
    assert all(b - a >= 100_000 for a, b in pairwise(starts))
    assert starts[0] + 2**32 - starts[-1] >= 100_000


@settings(deadline=None)
@given(seeds, st.sampled_from(["train", "sample"]), st.integers(0, 2**33))
def test_generator_repeats_itself_and_nothing_else(seed, stream, index):
    def draw(*item):
        return torch.randn(8, generator=seeded_rng(*item)).tolist()

    assert draw(seed, stream, index) == draw(seed, stream, index)
    others = [(seed + 1, stream, index), (seed, stream + "!", index), (seed, stream, index + 1)]
    assert all(draw(*other) != draw(seed, stream, index) for other in others)


def test_a_quantile_on_a_border_belongs_to_the_later_timestep():
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert Diffusion(4, "linear", "eps").timesteps_at(quantiles).tolist() == [0, 1, 2, 3]
