from fractions import Fraction
from itertools import chain, pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import ImageNoise, seeded_rng
from ddpm.diffusion.samplers import ddim, ddpm, dpmpp_2m, guided_denoiser, iter_samples, spaced_timesteps
from ddpm.diffusion.schedule import alphas_cumprod
from ddpm.diffusion.unet import UNet
from helpers import noise_in

CPU = torch.device("cpu")
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
COUNT, SHAPE, LABELS = 3, (1, 6, 6), torch.tensor([0, 4, 9])
KERNEL = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)) / 2

timesteps_and_steps = st.integers(1, 1000).flatmap(lambda timesteps: st.tuples(st.just(timesteps), st.integers(1, timesteps)))


def network(d: Diffusion):
    """A nonlinear stand-in for a network: a convolution, t and the class decide its x̂0, which can pass 1."""

    def model(x, t, y):
        x0 = 1.3 * torch.tanh(F.conv2d(x, KERNEL, padding=1) + torch.sin(t / 100 + y).view(-1, 1, 1, 1))
        return d.target(x0, t, noise_in(d, x0, x, t))

    return model


def image_noise(seed: int = 0, first: int = 0, count: int = COUNT) -> ImageNoise:
    return ImageNoise(seed, first, count, SHAPE, CPU)


def image_generators(seed: int = 0) -> list[torch.Generator]:
    """diffusers draws an image's noise from its own generator if given a list: the same numbers as `ImageNoise`."""
    return [seeded_rng(seed, "sample", i) for i in range(COUNT)]


def reference(scheduler_class: type, d: Diffusion, **options):
    """diffusers' scheduler with d's ᾱ in float64: its float32 loses three digits of 1 - ᾱ at small t, 1e-4 in a sample."""
    scheduler = scheduler_class(
        d.timesteps, beta_schedule=SCHEDULES[d.schedule], prediction_type=PREDICTIONS[d.prediction], **options
    )
    scheduler.alphas_cumprod = d.alphas_cumprod
    return scheduler


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# --- timesteps ---


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("timesteps", "steps"), [(1000, n) for n in (1, 2, 7, 16, 20, 50, 250, 1000)] + [(300, 30), (50, 50)])
def test_spaced_timesteps_same_as_diffusers(spacing, timesteps, steps, scheduler_class):
    scheduler = scheduler_class(timesteps, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert spaced_timesteps(timesteps, steps, spacing) == scheduler.timesteps.tolist()


@settings(deadline=None)
@given(timesteps_and_steps, st.sampled_from(["leading", "trailing", "linspace"]))
def test_spaced_timesteps_differ_from_diffusers_at_ties_only(count, spacing):
    """Halfway between two timesteps, float error decides diffusers' rounding; we are never further than half from exact.

    It also makes diffusers' trailing end in a timestep -1 too many now and then, as for 61 of 1000, hence no `strict`.
    """
    timesteps, steps = count
    scheduler = DDPMScheduler(timesteps, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    ours = spaced_timesteps(timesteps, steps, spacing)
    for i, (t, expected) in enumerate(zip(ours, scheduler.timesteps.tolist(), strict=False)):
        if spacing == "leading":
            exact = Fraction((steps - 1 - i) * (timesteps // steps))
        elif spacing == "trailing":
            exact = timesteps - Fraction(i * timesteps, steps) - 1
        else:
            exact = Fraction((steps - 1 - i) * (timesteps - 1), max(steps - 1, 1))
        assert abs(t - exact) <= Fraction(1, 2)
        assert t == expected or exact % 1 == Fraction(1, 2)


@settings(deadline=None)
@given(timesteps_and_steps, st.sampled_from(["leading", "trailing", "tapered", "linspace"]))
def test_spaced_timesteps_descend_between_the_ends(count, spacing):
    timesteps, steps = count
    times = spaced_timesteps(timesteps, steps, spacing)
    assert len(times) == steps and all(isinstance(t, int) for t in times)
    assert all(a > b for a, b in pairwise(times))
    assert times[0] == timesteps - 1 if spacing in ("trailing", "tapered") else times[-1] == 0
    assert min(times) >= 0 and max(times) < timesteps
    if spacing == "tapered":  # T-1 is the first interval's start, 0 the last one's end, and that one half as long
        full = (times[0] - times[-1]) / max(steps - 1, 1)
        assert steps == 1 or times[-1] == pytest.approx(full / 2, abs=1)
    assert spacing != "linspace" or steps == 1 or times[0] == timesteps - 1


def test_unknown_spacing():
    with pytest.raises(ValueError, match="'karras'"):
        spaced_timesteps(1000, 20, "karras")


# --- against diffusers: whole trajectories, step by step ---


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # for linspace, diffusers' DDIM steps to other ᾱ than it visits
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_same_as_diffusers(schedule, prediction, eta, clip, spacing):
    d = Diffusion(1000, schedule, prediction)
    model = network(d)
    ours = iter_samples(model, d, LABELS, 10, image_noise(), "ddim", 20, spacing, eta=eta, clip=clip)
    scheduler = reference(DDIMScheduler, d, clip_sample=clip, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    noise = image_noise()
    x = noise()
    for (our_x, our_x0), t in zip(ours, scheduler.timesteps, strict=True):
        output = model(x, t.expand(COUNT), LABELS)
        variance_noise = noise() if eta > 0 else None
        step = scheduler.step(output, t, x, eta, use_clipped_model_output=True, variance_noise=variance_noise)
        x = step.prev_sample
        assert_same(our_x, x)
        assert_same(our_x0, step.pred_original_sample)


def check_ddpm(d: Diffusion, spacing: str, steps: int, variance: str, clip: bool):
    model = network(d)
    ours = list(iter_samples(model, d, LABELS, 10, image_noise(), "ddpm", steps, spacing, variance=variance, clip=clip))
    scheduler = reference(DDPMScheduler, d, clip_sample=clip, timestep_spacing=spacing, variance_type=f"fixed_{variance}")
    scheduler.set_timesteps(steps)
    generators = image_generators()
    x = torch.stack([torch.randn(SHAPE, generator=g) for g in generators])
    for (our_x, our_x0), t in zip(ours, scheduler.timesteps, strict=True):
        step = scheduler.step(model(x, t.expand(COUNT), LABELS), t, x, generator=generators)
        x = step.prev_sample
        assert_same(our_x0, step.pred_original_sample)
        if t == scheduler.timesteps[-1] and t > 0 and variance == "large":
            # trailing stops short of t = 0, where diffusers adds β of noise to the finished sample; Ho et al. add none
            assert_same(our_x, our_x0)
        else:
            assert_same(our_x, x)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_strided_ddpm_same_as_diffusers(schedule, prediction, variance, spacing, clip):
    check_ddpm(Diffusion(1000, schedule, prediction), spacing, 20, variance, clip)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_full_ddpm_same_as_diffusers(schedule, prediction, variance):
    check_ddpm(Diffusion(200, schedule, prediction), "trailing", 200, variance, clip=True)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("schedule", "timesteps", "prediction"),
    # x̂0 from eps divides diffusers' float32 sigma by alpha, hence a schedule that ends well above 0 for eps
    [("linear", 300, "eps"), ("linear", 1000, "x0"), ("linear", 1000, "v"), ("cosine", 1000, "x0"), ("cosine", 1000, "v")],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpmpp_2m_same_as_diffusers(schedule, timesteps, prediction, spacing, steps, clip):
    d = Diffusion(timesteps, schedule, prediction)
    denoise = guided_denoiser(network(d), d, LABELS, 10, clip=clip)
    ours = iter_samples(network(d), d, LABELS, 10, image_noise(), "dpmpp_2m", steps, spacing, clip=clip)
    # diffusers' doesn't clip: where we do, it gets the clipped image as the network's output
    seen = Diffusion(timesteps, schedule, "x0") if clip else d
    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}
    scheduler = reference(DPMSolverMultistepScheduler, seen, **options)
    scheduler.set_timesteps(timesteps=spaced_timesteps(timesteps, steps, spacing))  # its own linspace and leading skip t = 0
    x = image_noise()()
    for (our_x, our_x0), t in zip(ours, scheduler.timesteps, strict=True):
        assert_same(our_x0, denoise(x, int(t)))
        output = denoise(x, int(t)) if clip else network(d)(x, t.expand(COUNT), LABELS)
        x = scheduler.step(output, t, x).prev_sample
        assert_same(our_x, x)


# --- against diffusers: single steps from anywhere ---


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULES)), st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.integers(0, 99)
)
def test_any_ddim_step_same_as_diffusers(schedule, steps, fraction, eta, clip, seed):
    d = Diffusion(1000, schedule, "x0")
    stride = 1000 // steps
    t = min(999, stride + round(fraction * (999 - stride)))
    if t < stride:
        return
    denoise = guided_denoiser(network(d), d, LABELS, 10, clip=clip)
    noise = image_noise(seed)
    scheduler = reference(DDIMScheduler, d, clip_sample=clip)
    scheduler.set_timesteps(steps)
    x = noise()
    step = scheduler.step(denoise(x, t), t, x, eta, use_clipped_model_output=True, variance_noise=noise())
    assert_same(next(ddim(denoise, image_noise(seed), d.alphas_cumprod, [t, t - stride], eta))[0], step.prev_sample)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True),
    st.sampled_from(["small", "large"]),
    st.integers(0, 99),
)
def test_any_ddpm_step_same_as_diffusers(schedule, times, variance, seed):
    d, times = Diffusion(1000, schedule, "x0"), sorted(times, reverse=True)
    denoise = guided_denoiser(network(d), d, LABELS, 10)
    scheduler = reference(DDPMScheduler, d, variance_type=f"fixed_{variance}")
    scheduler.set_timesteps(timesteps=times)
    generators = image_generators(seed)
    x = torch.stack([torch.randn(SHAPE, generator=g) for g in generators])
    step = scheduler.step(denoise(x, times[0]), times[0], x, generator=generators)
    assert_same(next(ddpm(denoise, image_noise(seed), d.alphas_cumprod, times, variance))[0], step.prev_sample)


# --- against closed forms: data ~ N(μ, s²), whose optimal denoiser is linear ---


def gaussian_denoiser(levels: torch.Tensor, mu: float, s: float):
    """E[x0 | x_t] for pixels ~ N(μ, s²)."""

    def denoise(x, t):
        alpha = levels[t].sqrt()
        return mu + alpha * s**2 / (alpha**2 * s**2 + 1 - levels[t]) * (x - alpha * mu)

    return denoise


def ode_solution(x: torch.Tensor, level: torch.Tensor, mu: float, s: float) -> torch.Tensor:
    """Where the probability-flow ODE takes x: it keeps (x_t - alpha μ) / √(alpha² s² + sigma²)."""
    return mu + s * (x - level.sqrt() * mu) / (level * s**2 + 1 - level).sqrt()


def white_noise(seed: int, *shape: int):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(*shape, dtype=torch.float64, generator=g)


def assert_normal(x: torch.Tensor, mean: float, std: float, bias: float):
    """To five standard errors, with room for the discretisation's own `bias`."""
    n = x.numel()
    assert abs(x.mean().item() - mean) < 5 * std / n**0.5 + bias
    assert abs(x.std().item() - std) < 5 * std / (2 * n) ** 0.5 + bias


@pytest.mark.parametrize(("mu", "s"), [(0.3, 0.5), (-0.5, 1.0)])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddim, {"eta": 0.0}),
        (ddim, {"eta": 1.0}),
        (ddpm, {"variance": "small"}),
        (ddpm, {"variance": "large"}),
        (dpmpp_2m, {}),
    ],
)
def test_samples_have_the_datas_distribution(sampler, options, mu, s):
    levels = alphas_cumprod("cosine", 1000)
    *_, (x, _) = sampler(gaussian_denoiser(levels, mu, s), white_noise(0, 4000), levels, range(999, -1, -1), **options)
    assert_normal(x, mu, s, bias=0.005)


def sampler_error(sampler, steps: int, spacing: str, mu: float = 0.3, s: float = 0.5) -> float:
    levels, times, x = alphas_cumprod("cosine", 1000), spaced_timesteps(1000, steps, spacing), white_noise(0, 1000)()
    *_, (sample, _) = sampler(gaussian_denoiser(levels, mu, s), lambda: x, levels, times)
    return (sample - ode_solution(x, levels[times[0]], mu, s)).abs().max().item()


@pytest.mark.parametrize(("mu", "s"), [(0.3, 0.5), (0.0, 1.0)])
def test_dpmpp_2m_beats_ddim_at_20_steps(mu, s):
    assert sampler_error(dpmpp_2m, 20, "trailing", mu, s) < sampler_error(ddim, 20, "trailing", mu, s) / 5


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2)])
def test_order_of_the_ode_solvers(sampler, order):
    """Twice the steps, 2**order times less error."""
    ratio = sampler_error(sampler, 80, "linspace") / sampler_error(sampler, 160, "linspace")
    assert ratio == pytest.approx(2**order, rel=0.15)


def test_ddim_converges_to_the_ode():
    assert sampler_error(ddim, 1000, "trailing") < 0.005


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddim, {"eta": 0.0}),
        (ddim, {"eta": 0.5}),
        (ddim, {"eta": 1.0}),
        (ddpm, {"variance": "small"}),
    ],
)
def test_one_image_has_the_forward_process_marginals(sampler, options, steps):
    """If all the data is one image, x at every timestep ~ N(alpha x0, sigma²), however few steps led there."""
    levels, times, x0 = alphas_cumprod("cosine", 1000), spaced_timesteps(1000, steps, "leading"), 0.7
    draw, start = white_noise(0, 20_000), levels[times[0]]
    draws = chain([start.sqrt() * x0 + (1 - start).sqrt() * draw()], (draw() for _ in times))
    run = sampler(gaussian_denoiser(levels, x0, 0), draws.__next__, levels, times, **options)
    for (x, _), t in zip(run, [*times[1:], None], strict=True):
        level = 1.0 if t is None else levels[t].item()
        assert_normal(x, level**0.5 * x0, (1 - level) ** 0.5, bias=1e-9)


@pytest.mark.parametrize("steps", [3, 20, 1000])
def test_large_variance_is_exact_for_unit_gaussians(steps):
    """Ho et al. 2020, sec. 3.2: with β as the variance, N(0, 1) stays N(0, 1), however few steps there are."""
    levels, times = alphas_cumprod("cosine", 1000), spaced_timesteps(1000, steps, "leading")
    *_, (x, _) = ddpm(gaussian_denoiser(levels, 0, 1), white_noise(3, 4000), levels, times, "large")
    assert_normal(x, 0, 1, bias=1e-4)  # the last step has no noise: std √ᾱ_0


# --- the denoiser: guidance and clipping ---


def guided(scale: float, clip: bool, labels: torch.Tensor, x: torch.Tensor, t: int, prediction: str = "v") -> torch.Tensor:
    d = Diffusion(1000, "cosine", prediction)
    return guided_denoiser(network(d), d, labels, 10, scale, clip=clip)(x, t)


@settings(deadline=None)
@given(st.integers(0, 950), st.floats(0, 5), st.sampled_from(sorted(PREDICTIONS)), st.integers(0, 99))
def test_guidance_is_linear_from_unconditional_to_conditional(t, scale, prediction, seed):
    x = image_noise(seed)()
    conditional = guided(1, False, LABELS, x, t, prediction)
    unconditional = guided(1, False, torch.full_like(LABELS, 10), x, t, prediction)
    mixed = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(guided(scale, False, LABELS, x, t, prediction), mixed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided(0, False, LABELS, x, t, prediction), unconditional, atol=1e-4, rtol=1e-4)
    assert (conditional - unconditional).abs().max() > 0.01  # so the scale matters


def test_guidance_scale_1_evaluates_the_network_once_an_image():
    d, batches = Diffusion(1000, "cosine", "v"), []

    def model(x, t, y):
        batches.append((t.tolist(), y.tolist()))
        return network(d)(x, t, y)

    x = image_noise()()
    plain = guided_denoiser(model, d, LABELS, 10, 1.0, clip=False)(x, 500)
    assert batches == [([500] * 3, [0, 4, 9])]
    t = torch.full((COUNT,), 500)
    assert torch.equal(plain, d.to_x0(network(d)(x, t, LABELS), x, t))
    guided_denoiser(model, d, LABELS, 10, 2.0)(x, 500)
    assert batches[1] == ([500] * 6, [0, 4, 9, 10, 10, 10])


@settings(deadline=None)
@given(st.integers(0, 950), st.floats(0, 5), st.sampled_from(sorted(PREDICTIONS)), st.integers(0, 99))
def test_guidance_leads_away_from_what_the_guide_makes_without_the_class(t, scale, prediction, seed):
    d, x = Diffusion(1000, "cosine", prediction), image_noise(seed)()
    no_labels, times = torch.full_like(LABELS, 10), torch.full((COUNT,), t)

    def guide(x, t, y):
        assert torch.equal(y, no_labels)
        return 0.5 * network(d)(x, t, y)

    own, worse = network(d)(x, times, LABELS), guide(x, times, no_labels)
    expected = d.to_x0(worse + scale * (own - worse), x, times)
    found = guided_denoiser(network(d), d, LABELS, 10, scale, clip=False, guide=guide)(x, t)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@settings(deadline=None)
@given(st.integers(0, 990), st.floats(0, 10), st.floats(0, 10), st.integers(0, 99))
def test_guidance_acts_only_within_its_interval_of_noise_levels(t, lowest, width, seed):
    d, x, sizes = Diffusion(1000, "cosine", "v"), image_noise(seed)(), []

    def model(x, t, y):
        sizes.append(len(x))
        return network(d)(x, t, y)

    interval = [lowest, lowest + width]
    limited = guided_denoiser(model, d, LABELS, 10, 3.0, interval)(x, t)
    is_within = lowest <= (d.sigma[t] / d.alpha[t]).item() <= lowest + width
    assert sizes == [2 * COUNT if is_within else COUNT]
    assert torch.equal(limited, guided(3.0 if is_within else 1.0, True, LABELS, x, t))


@settings(deadline=None)
@given(st.integers(0, 999), st.floats(0, 8), st.sampled_from(sorted(PREDICTIONS)), st.integers(0, 99))
def test_clip_keeps_x0_in_the_range_of_pixels(t, scale, prediction, seed):
    x = 3 * image_noise(seed)()
    free = guided(scale, False, LABELS, x, t, prediction)
    assert torch.equal(guided(scale, True, LABELS, x, t, prediction), free.clamp(-1, 1))


def test_an_unclipped_x0_leaves_the_range_of_pixels():
    assert guided(1, False, LABELS, image_noise()(), 500).abs().max() > 1.1


# --- noise and samples of an image depend on (seed, i) alone ---


def splits(total: int):
    """The sizes of batches that make up `total` images."""
    return st.sets(st.integers(1, total - 1)).map(lambda cuts: [0, *sorted(cuts), total])


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10**6), splits(12))
def test_noise_is_the_same_in_any_batches(seed, first, cuts):
    whole = ImageNoise(seed, first, 12, SHAPE, CPU)
    parts = [ImageNoise(seed, first + a, b - a, SHAPE, CPU) for a, b in pairwise(cuts)]
    for _ in range(3):
        assert torch.equal(whole(), torch.cat([part() for part in parts]))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10**6))
def test_no_noise_comes_twice(seed, first):
    noise = ImageNoise(seed, first, 4, SHAPE, CPU)
    draws = torch.cat([noise(), noise(), ImageNoise(seed + 1, first, 4, SHAPE, CPU)()])
    assert len(draws.flatten(1).unique(dim=0)) == 12


def test_noise_is_standard_normal():
    noise = ImageNoise(0, 0, 2000, (1, 8, 8), CPU)
    for draw in (noise(), noise()):
        assert_normal(draw, 0, 1, bias=0)
        assert_normal(draw.mean((1, 2, 3)), 0, 1 / 8, bias=0)  # the images are independent of each other
        assert_normal(draw.mean(0), 0, 2000**-0.5, bias=0)  # and so are the pixels


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    model = UNet(channels=(8, 16), blocks=1, attention=(7,), heads=2, patch_size=2).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def sample(unet: UNet, seed: int, first: int, labels: torch.Tensor, **options) -> torch.Tensor:
    noise = ImageNoise(seed, first, len(labels), (1, 28, 28), CPU)
    *_, (x, _) = iter_samples(unet, Diffusion(1000, "cosine", "v"), labels, 10, noise, steps=4, **options)
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddpm"},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 1.0, "guidance_scale": 2.0},
        {"sampler": "dpmpp_2m"},
    ],
)
def test_samples_are_the_same_in_any_batches(unet, options):
    labels = torch.arange(7) % 10
    whole = sample(unet, 0, 0, labels, **options)
    parts = torch.cat([sample(unet, 0, a, labels[a:b], **options) for a, b in pairwise([0, 1, 3, 7])])
    assert_same(parts, whole)
    assert torch.equal(sample(unet, 0, 0, labels, **options), whole)
    assert (sample(unet, 1, 0, labels, **options) - whole).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_one_evaluation_a_step_and_no_gradients(unet, sampler):
    d, times = Diffusion(1000, "cosine", "v"), []

    def model(x, t, y):
        times.append(t[0].item())
        return unet(x, t, y)

    *_, (x, x0) = iter_samples(model, d, LABELS, 10, ImageNoise(0, 0, 3, (1, 28, 28), CPU), sampler, steps=6, spacing="linspace")
    assert times == spaced_timesteps(1000, 6, "linspace")
    assert_same(x, x0)  # the last step lands on the clean image
    assert not x.requires_grad and x.abs().max() <= 1
