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


def test_frames_are_evenly_spaced_to_the_eye():
    """Those of a walk that lingers at its start and then hurries, chosen by hand."""
    distances = [100, 99, 98, 97, 96, 95, 94, 75, 50, 26, 24, 0]
    frames = [torch.full((2, 4, 4), d, dtype=torch.uint8) for d in distances]
    assert [int(x[0, 0, 0]) for x in evenly_spaced(frames, 5)] == [100, 75, 50, 26, 0]
    assert evenly_spaced(frames, 12) is frames
    assert len(evenly_spaced(frames, 11)) <= 11
