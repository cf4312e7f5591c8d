"""The bench's own pieces: that its comparison is between equals, that garbage stops it, and that the page is its figures."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import baselines
import gpu
import quality
import run
from contenders import NULL_CLASS, PEERS, SHAPE, Contender, Ours, guard, unet2d
from ddpm.data.fashion_mnist import load_split
from measure import RESULTS, gflop, kept
from run import PAGES, PARTS, TOLD, filled
from twin import Twin

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, *SHAPE, generator=g) * 2 - 1, torch.randint(NULL_CLASS, (n,), generator=g)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Ours, lambda: Ours(conditional=False), *PEERS])
def test_a_contender_learns_and_samples(make):
    torch.manual_seed(0)
    contender: Contender = make()
    contender.start(CPU)
    images, labels = batch(4)
    weights = [w.detach().clone() for w in contender.model.parameters()]
    averages = [w.detach().clone() for w in contender.ema.parameters()]
    losses = []
    for _ in range(12):
        with torch.random.fork_rng():
            torch.manual_seed(1)  # the same noise every time
            losses.append(contender.loss(images, labels).item())
        contender.step(images, labels)
    assert losses[-1] < losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(weights, contender.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(averages, contender.ema.parameters(), strict=True))
    network, evaluated = getattr(contender.ema, "model", contender.ema), []
    forward = network.forward  # a hook would miss the peer that calls it by its name

    def counted(x: torch.Tensor, *arguments: object, **options: object) -> object:
        evaluated.append(len(x))
        return forward(x, *arguments, **options)

    network.forward = counted
    drawn = contender.draw(4, 4)
    assert sum(evaluated) == 4 * 4
    assert drawn.shape == (4, 28, 28) and drawn.dtype == torch.uint8


def test_time_to_quality_goes_on_at_the_turn_it_was_in(fashion_mnist, monkeypatch, tmp_path):
    (tmp_path / "params.yaml").touch()
    for name, value in {"ROOT": tmp_path, "PEERS": (), "TURN": 0.01, "BATCH": 2, "OWN_MINUTES": (1, 3)}.items():
        monkeypatch.setattr(quality, name, value)
    monkeypatch.setattr(quality, "load_split", lambda _, split: load_split(fashion_mnist, split))
    monkeypatch.setattr(quality, "judge", lambda _: lambda samples: float(len(samples)))
    monkeypatch.setattr(quality, "judged", lambda c, count, fid: c.steps)
    turns, train = [], quality.train

    def interrupted(c: Contender, *arguments: object) -> None:
        turns.append(c.name)
        if len(turns) == 4:
            raise KeyboardInterrupt
        train(c, *arguments)

    monkeypatch.setattr(quality, "train", interrupted)
    with pytest.raises(SystemExit, match="the same command goes on"):
        quality.run(True)
    rows = quality.run(True)["rows"]
    with_classes, without = rows
    assert turns == [with_classes, without, with_classes, without, without, with_classes, without]
    for row in rows.values():
        assert row["fid"]["1"] < row["fid"]["3"] == row["images_seen"] / 2
    assert not list(tmp_path.glob(".cache/quality-*"))


def test_changed_code_starts_the_time_to_quality_anew():
    assert {*(ROOT / "src/ddpm").rglob("*.py")} <= {*quality.code_files()}


@pytest.mark.parametrize("heads", [None, 4])
def test_twin_is_the_peer_block_for_block(heads):
    """The same convolutions, and the same work to within a twentieth, though its conditioning also scales."""

    def kernels(model: torch.nn.Module) -> list[tuple[int, ...]]:
        return sorted(tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Conv2d))

    torch.manual_seed(0)
    mine, theirs = Twin(heads=heads), unet2d()
    assert kernels(mine) == kernels(theirs)
    x, t, y = torch.randn(4, *SHAPE), torch.arange(4), torch.arange(4)
    ratio = gflop(lambda: mine(x, t, y).sum().backward()) / gflop(lambda: theirs(x, t, y).sample.sum().backward())
    assert 0.95 < ratio < 1.05


def test_guard_lets_images_pass_and_stops_the_rest():
    images, _ = batch(40)
    assert guard("x", images).dtype == torch.uint8
    for bad in (images.clone().index_fill(0, torch.tensor([3]), float("nan")), torch.zeros_like(images), images * 0 + 7.0):
        with pytest.raises(SystemExit, match=r"^x: .*(not finite|blank)"):
            guard("x", bad)
    images[0] = 0  # one blank image in forty is let pass
    guard("x", images)


def test_garbage_is_no_figure(monkeypatch):
    contender = Ours()
    contender.start(CPU)
    assert quality.judged(contender, 20, lambda images: float(images.shape[0])) == 20
    monkeypatch.setattr(contender, "sample", lambda labels, evaluations: torch.zeros(len(labels), *SHAPE))
    rows = {"x": {"fid": {"1": 0.5, "2": quality.judged(contender, 20, len)}, "images_seen": 64}}
    told = quality.report({"rows": rows, "samples": 20, "evaluations": 20})
    assert "| x | 0.500 | garbage | 64 |" in told
    monkeypatch.setitem(PARTS, "rates", SimpleNamespace(run=lambda full: {}, report=lambda result: told))
    monkeypatch.setattr(sys, "argv", ["run.py", "rates"])
    with pytest.raises(SystemExit, match="among the samples of: rates"):
        run.main()


def test_a_gpu_report_tells_what_there_is():
    on = {"date": "2026-11-27", "commit": "abc", "processor": "X", "python": "3", "versions": {"torch": "2"}}
    rates = {
        "matrix products, TFLOP/s": 800.0,
        "memory, GB/s": 4000.0,
        "images/s": 40_000.0,
        "GFLOP an image": 0.4,
        "MB an image": 2.0,
    }
    parts = {"rates": rates, "peers": {"diffusers": 5000.0}, "helped": {"diffusers": "RuntimeError: no"}}
    parts["fast"] = {"images/s": 60_000.0}
    parts["default"] = {"first run: train, s": 44.13, "first run: sample, s": 10.5, "fid": 0.07, "fid_floor": 0.005}
    result = {name: {"on": on, "figures": figures} for name, figures in parts.items()}
    text = gpu.report(result)
    assert "| this project | 40,000 |" in text and "| this project, `runtime.deterministic: false` | 60,000 |" in text
    assert "| diffusers: eager, data on the host | 5,000 | 8.0 | 12.0 |" in text
    del result["fast"]
    assert "| diffusers: eager, data on the host | 5,000 | 8.0 |\n" in gpu.report(result)
    assert "| diffusers: compiled, channels_last, data on the device | RuntimeError: no |" in text
    assert "| matrix products | 800 TFLOP/s | 2.0% |" in text and "| memory | 4,000 GB/s | 2.0% |" in text
    assert "| first run | 44.1 s | 10.5 s |  |" in text and "14.0 times the floor" in text
    assert text.count("2026-11-27") == 1
    for name, figures in parts.items():  # as where a limit of time cut it off
        for n in range(len(figures)):
            gpu.report(result | {name: {"on": on, "figures": dict(list(figures.items())[:n])}})


MEASURED = sorted(path.stem for path in RESULTS.glob("*.json"))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("part", TOLD)
def test_the_pages_hold_the_figures_that_were_measured(part, page):
    result = kept(part)
    assert filled(page, part, result) == page.read_text()
    assert result is None or part in ("models", "gpu") or result["full"]


def test_pages_have_a_place_for_each_part_and_no_missing_picture():
    assert MEASURED and set(MEASURED) <= set(TOLD)
    ablated = ["ablations", "samplers"]
    results = sorted({*TOLD} - {"scale", *ablated})
    for page, places in zip(PAGES, (results, ablated, ["scale"], ["quality", "throughput"]), strict=True):
        text = page.read_text()
        assert sorted(re.findall(r"<!-- (\w+) -->", text)) == places
        assert [path for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) if not (page.parent / path).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("part", ["guidance", "classes", "cas"])
def test_the_published_model_is_measured(part, fashion_mnist, real_features, monkeypatch):
    """In the short form; `load_split` takes what there is in place of what a default run leaves."""
    module = PARTS[part]
    monkeypatch.setattr(module, "load_split", lambda _, split: load_split(fashion_mnist, split))
    result = module.run(False)
    assert "nan" not in module.report(result)
    if part == "guidance":
        weak, strong = result["rows"]["1.0"], result["rows"]["2.0"]
        assert strong["class_accuracy"] > weak["class_accuracy"]
    elif part == "classes":
        rows = result["rows"].values()
        assert min(row[name] for row in rows for name in ("fid", "floor")) > 0
        assert sum(row["accuracy"] for row in rows) / len(rows) > 0.8
    else:
        assert all(0.15 < value < 0.9 for value in result["accuracy"].values())


def test_gaussians_have_the_mean_and_the_variance_of_each_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 10
    brightness = torch.randn(2000, generator=generator) * 10 + 60 + 12 * labels
    images = (brightness[:, None, None].expand(-1, 4, 4) + torch.randn(2000, 4, 4, generator=generator)).round().to(torch.uint8)
    drawn = baselines.gaussians(images, labels, 1, 16, 1995)  # not a multiple of ten
    assert drawn.shape == (1995, 4, 4) and drawn.dtype == torch.uint8
    for c in range(10):
        samples, real = drawn[c::10].float(), images[labels == c].float()
        assert abs(samples.mean() - real.mean()) < 3
        assert samples.mean((1, 2)).std().item() == pytest.approx(real.mean((1, 2)).std().item(), rel=0.2)
        assert samples.std((1, 2)).mean().item() == pytest.approx(real.std((1, 2)).mean().item(), rel=0.2)


def test_a_mixture_of_gaussians_keeps_its_clusters():
    labels = torch.arange(2000) % 10
    of_two = torch.where(torch.arange(2000) // 10 % 4 == 0, 200, 50)  # a quarter of each class is bright
    noise = torch.randn(2000, 4, 4, generator=torch.Generator().manual_seed(0))
    images = (of_two[:, None, None] + 3 * noise).round().to(torch.uint8)
    means = baselines.gaussians(images, labels, 2, 4, 2000).float().mean((1, 2))
    assert ((means - 200).abs() < 20).float().mean() == pytest.approx(0.25, abs=0.04)
    assert ((means - 50).abs() < 20).float().mean() == pytest.approx(0.75, abs=0.04)


def test_a_part_takes_its_place_and_leaves_the_rest(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rates -->\nold\n<!-- /rates -->\nafter\n")
    assert filled(page, "rates", None) == "before\n<!-- rates -->\nNot measured yet.\n<!-- /rates -->\nafter\n"
    assert filled(page, "step", None) == page.read_text()
