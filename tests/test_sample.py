"""Sampling in batches, from a network that has learned nothing: what an interrupted run has drawn it doesn't draw again."""

from pathlib import Path

import pytest
import torch
import yaml

from ddpm.params import Params
from ddpm.sampling.batches import Drawn, draw_images
from ddpm.sampling.pictures import evenly_spaced
from ddpm.sampling.pipeline import BATCH, Pipeline

ROOT = Path(__file__).resolve().parents[1]
N = 2 * BATCH + 50


@pytest.fixture(scope="module")
def pipeline(random_model) -> Pipeline:
    return Pipeline(random_model, torch.device("cpu"))


def draw(pipeline: Pipeline, folder: Path) -> Drawn:
    p = Params.model_validate(yaml.safe_load((ROOT / "params.yaml").read_text())).sample
    p = p.model_copy(update={"sampler": "ddpm", "steps": 3, "seed": 1, "guidance_scale": 1.0, "count": N})
    folder.mkdir(exist_ok=True)
    return draw_images(pipeline, p, folder)


def test_only_what_is_missing_or_damaged_is_drawn_again(pipeline, tmp_path, monkeypatch):
    drawn = draw(pipeline, tmp_path)
    images, frames = drawn.images, drawn.frames
    first, second, third = sorted(tmp_path.iterdir())
    assert drawn.newly_drawn == N
    assert [len(x) for x in frames] == [10, 10, 10, 10]  # the noise, and what each of three steps makes of it
    assert torch.equal(frames[-1], images[:10])
    assert len(images.flatten(1).unique(dim=0)) == N

    def same_with(expected: int) -> None:
        again = draw(pipeline, tmp_path)
        assert again.newly_drawn == expected
        assert torch.equal(again.images, images)
        assert all(torch.equal(a, b) for a, b in zip(again.frames, frames, strict=True))

    same_with(0)
    third.unlink()
    same_with(50)
    second.write_bytes(second.read_bytes()[:-1])
    same_with(BATCH)
    first.unlink()
    same_with(BATCH)

    monkeypatch.setattr(pipeline, "batch_size", 2 * BATCH)  # as on another device
    same_with(2 * BATCH)  # of what was kept the last batch alone is what it should be


@pytest.fixture(scope="module")
def guided_model(random_model, tmp_path_factory) -> Path:
    """The same model with a guide that has learned nothing either."""
    content = torch.load(random_model, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    content["guide"] = {name: torch.randn(w.shape, generator=generator) * 0.1 for name, w in content["weights"].items()}
    path = tmp_path_factory.mktemp("guided") / "guided.pth"
    torch.save(content, path)
    return path


def four(model: Path, classes: str = "all", **changes: object) -> torch.Tensor:
    """Four images of bags, or of no class."""
    p = Params.model_validate(yaml.safe_load((ROOT / "params.yaml").read_text())).sample
    p = p.model_copy(update={"steps": 6, "guidance_interval": None, "classes": classes, **changes})
    labels = torch.full((4,), 8 if classes == "all" else 10)
    *_, x = Pipeline(model, torch.device("cpu")).iter_samples(labels, p)
    return x


@pytest.mark.parametrize("name", ["random_model", "guided_model"])
def test_guidance_acts_only_within_the_interval(name, request):
    model = request.getfixturevalue(name)
    unguided, everywhere = four(model, guidance_scale=1.0), four(model, guidance_scale=3.0)
    within = four(model, guidance_scale=3.0, guidance_interval=[0.2, 3.2])
    assert torch.equal(four(model, guidance_scale=3.0, guidance_interval=[1e-6, 2e-6]), unguided)  # no timestep lies between
    for a, b in ((unguided, everywhere), (everywhere, within), (within, unguided)):
        assert (a - b).abs().max() > 0.001


def test_guidance_away_from_a_guide_is_another(random_model, guided_model):
    assert torch.equal(four(random_model, guidance_scale=1.0), four(guided_model, guidance_scale=1.0))
    assert (four(random_model, guidance_scale=3.0) - four(guided_model, guidance_scale=3.0)).abs().max() > 0.01


def test_a_model_without_classes_is_guided_only_by_a_guide(random_model, guided_model):
    """Guidance towards a class needs one; guidance away from a worse model doesn't."""
    assert torch.equal(four(random_model, "none", guidance_scale=1.0), four(random_model, "none", guidance_scale=3.0))
    unguided, guided = (four(guided_model, "none", guidance_scale=scale) for scale in (1.0, 3.0))
    assert (unguided - guided).abs().max() > 0.01


def test_frames_are_evenly_spaced_to_the_eye():
    """Those of a walk that lingers at its start and then hurries, chosen by hand."""
    distances = [100, 99, 98, 97, 96, 95, 94, 75, 50, 26, 24, 0]
    frames = [torch.full((2, 4, 4), d, dtype=torch.uint8) for d in distances]
    assert [int(x[0, 0, 0]) for x in evenly_spaced(frames, 5)] == [100, 75, 50, 26, 0]
    assert evenly_spaced(frames, 12) is frames
    assert len(evenly_spaced(frames, 11)) <= 11
