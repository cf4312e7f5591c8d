import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm.diffusion.unet import Attention, ResBlock, UNet, timestep_embedding

CONFIGS = [
    {"patch_size": 1, "channels": (16, 16, 32), "blocks": 1, "attention": (7,), "heads": 2},
    {"patch_size": 1, "channels": (16,), "blocks": 1, "attention": (), "heads": 1},
    {"patch_size": 2, "channels": (16, 32), "blocks": 2, "attention": (7,), "heads": 4},
    {"patch_size": 2, "channels": (32, 16), "blocks": 1, "attention": (7, 14), "heads": 8, "dropout": 0.2},
    {"patch_size": 4, "channels": (24,), "blocks": 3, "attention": (7,), "heads": 3},
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"patch{c['patch_size']}-{'-'.join(map(str, c['channels']))}")


@st.composite
def any_config(draw):
    """Any network that 28 pixels allow: 28 / patch_size must halve evenly at each further level."""
    patch_size = draw(st.sampled_from([1, 2, 4]))
    most_levels = {1: 3, 2: 2, 4: 1}[patch_size]
    return {
        "patch_size": patch_size,
        "channels": tuple(draw(st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=most_levels))),
        "blocks": draw(st.integers(1, 3)),
        "attention": tuple(draw(st.sets(st.sampled_from([7, 14])))),
        "heads": draw(st.sampled_from([1, 2, 4, 8])),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
    }


def perturbed(seed: int = 0, **config) -> UNet:
    """A network with no zeros left in its weights, as after some training."""
    torch.manual_seed(seed)
    model = UNet(**config)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def batch(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, timesteps and classes, the null class among them, all different."""
    x = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(0, 999, count).long(), 10 - torch.arange(count) % 11


@settings(max_examples=15, deadline=None)
@given(any_config(), st.integers(1, 3))
def test_output_has_the_inputs_shape_and_starts_at_zero(config, count):
    model, (x, t, y) = UNet(**config), batch(count)
    assert torch.equal(model(x, t, y), torch.zeros(count, 1, 28, 28))
    output = perturbed(**config)(x, t, y)
    assert output.shape == x.shape and output.dtype == torch.float32
    assert output.isfinite().all() and output.std() > 1e-3


def test_colour_images_of_another_size():
    model = perturbed(channels=(8, 16), blocks=1, attention=(8,), image_size=32, image_channels=3, classes=4)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0, 999])
    assert model(x, t, torch.tensor([0, 4])).shape == x.shape  # 4 is the null class
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([0, 5]))


@configs
def test_every_parameter_learns(config):
    model, (x, t, y) = perturbed(**config), batch(11)
    (model(x, t, y) - torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    largest = max(norms.values())
    assert torch.tensor(list(norms.values())).isfinite().all()
    assert [name for name, norm in norms.items() if norm < 1e-6 * largest] == []  # float32 rounding would leave 1e-8
    assert (model.embed_class.weight.grad.norm(dim=1) > 1e-6 * largest).all()  # each class, and the null class
    conditions = [p.grad for name, p in model.named_parameters() if name.endswith("condition.bias")]
    assert all((grad != 0).all() for grad in conditions)  # each channel's scale and its shift


def test_only_the_head_learns_at_first():
    """With zero weights in the head, nothing before it has a gradient, but the head itself does."""
    model, (x, t, y) = UNet(channels=(16,), blocks=1, attention=()), batch()
    (model(x, t, y) - x).square().mean().backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad.norm() > 0}
    assert learning == {"head"}


@configs
@torch.no_grad()
def test_class_and_timestep_change_the_output(config):
    model, (x, _, _) = perturbed(**config), batch(1)
    x = x.expand(6, -1, -1, -1)
    t, y = torch.tensor([500, 500, 500, 0, 501, 999]), torch.tensor([3, 4, 10, 3, 3, 3])
    outputs = model(x, t, y)
    distances = torch.pdist(outputs.flatten(1)) / outputs.flatten(1).norm(dim=1).mean()
    assert distances.min() > 1e-4  # rounding is 1e-6


@configs
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(config):
    model, (x, t, y) = perturbed(**config), batch(4)
    outputs = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(outputs, alone, atol=1e-5, rtol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order], t[order], y[order]), outputs[order], atol=1e-5, rtol=1e-5)


@configs
def test_every_pixel_reaches_the_corner(config):
    model, (x, t, y) = perturbed(**config), batch(1)
    x.requires_grad_()
    model(x, t, y)[0, 0, 0, 0].backward()
    reached = (x.grad[0, 0] != 0).float().mean()
    assert reached == 1  # the group norms and the middle's attention are global


@configs
@torch.no_grad()
def test_channels_last_changes_nothing(config):
    model, (x, t, y) = perturbed(**config), batch()
    expected = model(x, t, y)
    model.to(memory_format=torch.channels_last)
    actual = model(x.to(memory_format=torch.channels_last), t, y)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@configs
@torch.no_grad()
def test_state_dict_round_trip(config):
    model, other, inputs = perturbed(0, **config), perturbed(1, **config), batch()
    assert not torch.allclose(model(*inputs), other(*inputs))
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(model(*inputs), other(*inputs))


@torch.no_grad()
def test_dropout_is_for_training_only():
    model, inputs = perturbed(channels=(16,), blocks=1, attention=(), dropout=0.3), batch()
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.allclose(model(*inputs), model(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("attention", [(), (7,), (7, 14)])
def test_attention_at_the_named_resolutions(attention):
    model = UNet(channels=(16, 32), blocks=1, attention=attention, heads=2)
    sizes = []
    for module in model.modules():
        if type(module).__name__ == "Attention":
            module.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[-1]))
    model(*batch(1))
    expected = [size for size in (14, 7) if size in attention]
    assert sizes == [*expected, 7, *reversed(expected)]  # down, the middle, up


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_same_as_torchs(heads):
    torch.manual_seed(0)
    attention, expected = Attention(16, heads, groups=8), nn.MultiheadAttention(16, heads, batch_first=True)
    for p in attention.parameters():
        p.normal_()
    expected.in_proj_weight.copy_(attention.qkv.weight)
    expected.in_proj_bias.copy_(attention.qkv.bias)
    expected.out_proj.load_state_dict(attention.out.state_dict())
    x = torch.randn(2, 16, 5, 7)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    added = expected(tokens, tokens, tokens)[0].transpose(1, 2).view_as(x)
    torch.testing.assert_close(attention(x), x + added, atol=1e-4, rtol=1e-4)


@configs
@torch.no_grad()
def test_what_each_block_made_going_down_comes_back_going_up(config):
    model, made, received = perturbed(**config), [], []
    for level in model.down:
        for _, attend in level:
            attend.register_forward_hook(lambda _, __, output: made.append(output))
    for level in model.up:
        for block, _ in level:
            block.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    model(*batch())
    assert len(made) == len(received) == len(config["channels"]) * config["blocks"]
    assert all(torch.equal(h[:, -skip.shape[1] :], skip) for h, skip in zip(received, reversed(made), strict=True))


@settings(deadline=None)
@given(st.sampled_from([2, 16, 48, 128]), st.lists(st.integers(0, 4000), min_size=1, max_size=8))
def test_timestep_embedding_same_as_diffusers(width, times):
    t = torch.tensor(times)
    expected = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, width), expected, atol=1e-5, rtol=0)


def test_timestep_embeddings_are_all_different():
    embeddings = timestep_embedding(torch.arange(1000), 48)
    assert embeddings.shape == (1000, 48)
    assert torch.pdist(embeddings).min() > 0.1


def test_a_residual_block_scales_and_shifts_by_its_condition():
    torch.manual_seed(0)
    block = ResBlock(8, 16, 4, 0.0, 8)
    nn.init.normal_(block.conv2.weight)  # zero at first
    x, emb = torch.randn(2, 8, 5, 5), torch.randn(2, 4)
    scale, shift = (block.condition(emb)[:, rows, None, None] for rows in (slice(16), slice(16, None)))
    h = F.group_norm(block.conv1(F.silu(F.group_norm(x, 8, block.norm1.weight, block.norm1.bias))), 8)
    expected = block.shortcut(x) + block.conv2(F.silu(h * (1 + scale) + shift))
    assert torch.allclose(block(x, emb), expected, atol=1e-5)


def test_the_head_sees_what_its_norm_and_a_silu_leave():
    network, seen = UNet(channels=(8,), blocks=1, attention=(), heads=1), {}
    network.norm.register_forward_hook(lambda _module, _given, output: seen.update(norm=output))
    network.head.register_forward_hook(lambda _module, given, _output: seen.update(head=given[0]))
    network(torch.randn(2, 1, 28, 28), torch.tensor([3, 4]), torch.tensor([0, 1]))
    assert torch.equal(seen["head"], F.silu(seen["norm"]))
