import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.diffusion.schedule import alphas_cumprod, betas, terminal_warning

DIFFUSERS = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
schedules = st.sampled_from(sorted(DIFFUSERS))


@pytest.mark.parametrize("timesteps", [10, 300, 1000, 4000])
@pytest.mark.parametrize("schedule", DIFFUSERS)
def test_same_as_diffusers(schedule, timesteps):
    reference = DDPMScheduler(timesteps, beta_schedule=DIFFUSERS[schedule])  # in float32
    torch.testing.assert_close(betas(schedule, timesteps), reference.betas.double(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(alphas_cumprod(schedule, timesteps), reference.alphas_cumprod.double(), atol=1e-5, rtol=0)


def test_cosine_is_the_closed_form_below_the_cap():
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    expected = f / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    torch.testing.assert_close(alphas_cumprod("cosine", 1000)[:-1], expected, rtol=1e-9, atol=0)
    assert betas("cosine", 1000)[-1] == 0.999


@settings(deadline=None)
@given(schedules, st.integers(2, 2000))
def test_noise_only_grows(schedule, timesteps):
    levels = alphas_cumprod(schedule, timesteps)
    assert levels.shape == (timesteps,) and levels.dtype == torch.float64
    assert levels[0] < 1 and levels[-1] > 0
    assert (levels.diff() < 0).all()


def test_linear_keeps_its_range_whatever_t_is():
    for timesteps in (300, 1000):
        assert betas("linear", timesteps)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])


@pytest.mark.parametrize("function", [betas, alphas_cumprod, terminal_warning])
def test_unknown_schedule(function):
    with pytest.raises(ValueError, match="'exponential'"):
        function("exponential", 1000)


def test_terminal_warning_names_what_is_left_of_the_image():
    assert "√ᾱ_T = 0.22" in terminal_warning("linear", 300)  # exp(½ Σ log(1 - β)) with mean β 0.01: about exp(-1.5)


@pytest.mark.parametrize(("schedule", "timesteps"), [("linear", 1000), ("cosine", 1000), ("cosine", 100), ("sigmoid", 1000)])
def test_no_warning_for_a_schedule_that_ends_in_noise(schedule, timesteps):
    assert terminal_warning(schedule, timesteps) is None


@settings(deadline=None)
@given(schedules, st.integers(2, 1500))
def test_warning_exactly_where_a_trace_is_left(schedule, timesteps):
    trace = DDPMScheduler(timesteps, beta_schedule=DIFFUSERS[schedule]).alphas_cumprod[-1].sqrt().item()
    if abs(trace - 0.05) > 1e-4:  # else float32 may have it on the other side
        assert (terminal_warning(schedule, timesteps) is not None) == (trace > 0.05)
