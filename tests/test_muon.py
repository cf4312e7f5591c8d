"""Muon beside PyTorch's own (which takes single matrices, in bfloat16), and what orthogonalising means."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from ddpm.training import muon
from ddpm.training.muon import NS_COEFFICIENTS, NS_STEPS, Muon, orthogonalised


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30),
    extra=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    scale=st.sampled_from([1.0, 1e6]),
    seed=st.integers(0, 10**6),
)
def test_orthogonalised_is_the_iteration_on_singular_values(rows, extra, scale, seed):
    a, b, c = NS_COEFFICIENTS
    g = torch.Generator().manual_seed(seed)
    matrices = [scale * torch.randn(rows, rows + more, generator=g, dtype=torch.float64) for more in extra]
    single = orthogonalised([x.float() for x in matrices])
    for x, double, float32 in zip(matrices, orthogonalised(matrices), single, strict=True):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        s = s / s.norm()
        for _ in range(NS_STEPS):
            s = a * s + b * s**3 + c * s**5
        expected = u * s @ vt
        torch.testing.assert_close(double, expected, atol=1e-4, rtol=0)  # the guard against a norm of zero is 1e-7
        torch.testing.assert_close(float32.double(), expected, atol=5e-3, rtol=0)


def test_what_is_far_from_singular_ends_near_orthogonal():
    (x,) = orthogonalised([torch.randn(96, 864, generator=torch.Generator().manual_seed(0))])
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.6 and values.max() < 1.25


def test_the_rank_may_be_low():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 5, generator=g) @ torch.randn(5, 432, generator=g)
    (y,) = orthogonalised([x])
    values = torch.linalg.svdvals(y)
    assert values[:5].min() > 0.6 and values[:5].max() < 1.25 and values[5:].max() < 0.02


def test_tf32_is_off_for_the_iteration_alone(monkeypatch):
    seen = []
    polynomial = muon.polynomial
    monkeypatch.setattr(muon, "polynomial", lambda gram: seen.append(torch.get_float32_matmul_precision()) or polynomial(gram))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        orthogonalised([torch.randn(4, 8)])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"} and len(seen) == NS_STEPS


def test_pytorch_orthogonalises_alike():
    g = torch.randn(96, 432, generator=torch.Generator().manual_seed(0))
    theirs = _zeropower_via_newtonschulz(g, NS_COEFFICIENTS, NS_STEPS, 1e-7).float()
    (ours,) = orthogonalised([g])
    assert (ours - theirs).norm() / ours.norm() < 0.02  # bfloat16 has three digits


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_steps_are_those_of_pytorch(shape):
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = copy.deepcopy(mine)
    ours = Muon(mine, lr=0.02, momentum=0.9, weight_decay=0.1)
    pytorch = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in mine]
    for _ in range(10):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
        ours.step()
        pytorch.step()
    for p, q, before in zip(mine, theirs, start, strict=True):
        assert (p - q).norm() < 0.03 * (p - before).norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_a_matrix_of_its_outputs(memory_format):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=memory_format))
    matrix = torch.nn.Parameter(weight.detach().clone().flatten(1))
    weight.grad = torch.randn(8, 4, 3, 3).to(memory_format=memory_format)
    matrix.grad = weight.grad.flatten(1)
    for p in (weight, matrix):
        Muon([p], lr=0.1).step()
    assert weight.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(weight.flatten(1), matrix)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_replayed_graph_gives_what_eager_gives():
    torch.manual_seed(0)
    shapes = ((8, 16), (16, 8), (8, 4, 3, 3), (12, 2, 1, 1))
    replayed = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    eager = copy.deepcopy(replayed)
    mine, theirs = Muon(replayed, lr=0.1), Muon(eager, lr=0.1)
    for step in range(6):
        for p, q in zip(replayed, eager, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 3:
            mine.load_state_dict(copy.deepcopy(mine.state_dict()))
        theirs.warm = False
        for optimizer in (mine, theirs):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
    assert mine.replays and not theirs.replays
    for p, q in zip(replayed, eager, strict=True):
        assert torch.equal(p, q)


def test_matrices_of_other_shapes_do_not_meddle():
    torch.manual_seed(0)
    together = [
        torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 16), (16, 8), (8, 16), (8, 4, 3, 3), (8, 8), (12, 2, 1, 1))
    ]
    alone = copy.deepcopy(together)
    for p, q in zip(together, alone, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    Muon(together, lr=0.1).step()
    for q in alone:
        Muon([q], lr=0.1).step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q)
