"""Sampling in batches, from a network that has learned nothing: what an interrupted run has drawn it doesn't draw again."""

from pathlib import Path

import pytest
import torch
import yaml

import sample
from ddpm.diffusion import Diffusion
from ddpm.params import Params
from ddpm.unet import UNet

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
N = 2 * sample.BATCH + 50


@pytest.fixture(scope="module")
def network() -> tuple[UNet, Diffusion]:
    torch.manual_seed(0)
    model = UNet(channels=[8, 16], blocks=1, attention=[], heads=2, dropout=0.0, patch_size=2).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.1
    return model, Diffusion(timesteps=50, schedule="cosine", prediction="v", min_snr_gamma=5.0)


def draw(network: tuple[UNet, Diffusion], folder: Path, **changes) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    p = Params.model_validate(yaml.safe_load((ROOT / "params.yaml").read_text())).sample
    p = p.model_copy(update={"sampler": "ddpm", "steps": 3, "seed": 1, **changes})
    folder.mkdir(exist_ok=True)
    return sample.draw(*network, torch.arange(N) % 10, p, 1.0, CPU, folder)


def test_only_what_is_missing_or_damaged_is_drawn_again(network, tmp_path):
    images, history, drawn = draw(network, tmp_path)
    first, second, third = sorted(tmp_path.iterdir())
    assert drawn == N
    assert [len(x) for x in history] == [10, 10, 10]
    assert torch.equal(history[-1], images[:10])
    assert len(images.flatten(1).unique(dim=0)) == N

    def same_with(expected: int) -> None:
        again, history_again, drawn = draw(network, tmp_path)
        assert drawn == expected
        assert torch.equal(again, images)
        assert all(torch.equal(a, b) for a, b in zip(history_again, history, strict=True))

    same_with(0)
    third.unlink()
    same_with(50)
    second.write_bytes(second.read_bytes()[:-1])
    same_with(sample.BATCH)
    first.unlink()
    same_with(sample.BATCH)
