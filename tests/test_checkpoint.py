import io

import pytest
import torch

from ddpm.checkpoint import load_checkpoint, save_checkpoint
from ddpm.data.fashion_mnist import CLASSES
from ddpm.diffusion.unet import UNet
from ddpm.errors import UserError
from ddpm.tensor_files import serialise

SMALL = {"channels": [8, 16], "blocks": 1, "attention": [7], "heads": 2, "dropout": 0.1, "patch_size": 2}
DIFFUSION = {"timesteps": 50, "schedule": "cosine", "prediction": "v", "min_snr_gamma": 5.0}
CPU = torch.device("cpu")
REMEDY = "`dvc repro train` makes models/diffusion_model.pth"


def random_unet(seed: int = 0, **changes) -> UNet:
    """A network none of whose weights are zero, so that its output depends on all of them."""
    generator = torch.Generator().manual_seed(seed)
    model = UNet(**{**SMALL, **changes})
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval()


def test_model_round_trip(tmp_path):
    model = random_unet()
    save_checkpoint(tmp_path / "m.pth", model.state_dict(), SMALL, DIFFUSION, 0.25)
    checkpoint = load_checkpoint(tmp_path / "m.pth", CPU)
    loaded, diffusion = checkpoint.model, checkpoint.diffusion
    label_dropout, classes = checkpoint.label_dropout, checkpoint.classes

    x, t, y = torch.randn(4, 1, 28, 28), torch.tensor([0, 7, 30, 49]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        expected = model(x, t, y)
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(loaded(x, t, y), expected, rtol=1e-4, atol=1e-5)  # another memory format rounds otherwise
    for name, w in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], w), name
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {name: getattr(diffusion, name) for name in DIFFUSION} == DIFFUSION
    assert label_dropout == 0.25
    assert classes == list(CLASSES)
    assert checkpoint.guide is None


def test_a_guide_round_trip(tmp_path):
    model, guide = random_unet(), random_unet(seed=1)
    save_checkpoint(tmp_path / "m.pth", model.state_dict(), SMALL, DIFFUSION, 0.25, guide=guide.state_dict())
    checkpoint = load_checkpoint(tmp_path / "m.pth", CPU)
    for name, w in guide.state_dict().items():
        assert torch.equal(checkpoint.guide.state_dict()[name], w), name
        assert torch.equal(checkpoint.model.state_dict()[name], model.state_dict()[name]), name
    assert not checkpoint.guide.training
    assert not any(p.requires_grad for p in checkpoint.guide.parameters())


def test_a_guide_that_was_read_from_a_file_gives_the_same_bytes(tmp_path):
    """As after a resumed training, whose guide has been in a saved state: its keys are equal, but other objects."""
    model, guide = random_unet(), random_unet(seed=1)
    save_checkpoint(tmp_path / "a.pth", model.state_dict(), SMALL, DIFFUSION, 0.1, guide=guide.state_dict())
    read = torch.load(io.BytesIO(serialise(dict(reversed(guide.state_dict().items())))))
    save_checkpoint(tmp_path / "b.pth", model.state_dict(), SMALL, DIFFUSION, 0.1, guide=read)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_another_data_set_s_shape_and_classes(tmp_path):
    shape = {**SMALL, "classes": 2, "image_channels": 3, "image_size": 32, "attention": []}
    save_checkpoint(tmp_path / "m.pth", UNet(**shape).state_dict(), shape, DIFFUSION, 0.25, ["cat", "dog"])
    checkpoint = load_checkpoint(tmp_path / "m.pth", CPU)
    loaded, classes = checkpoint.model, checkpoint.classes
    assert (loaded.image_shape, loaded.null_class, classes) == ((3, 32, 32), 2, ["cat", "dog"])


def test_an_old_checkpoint_without_a_data_name_is_of_fashion_mnist(tmp_path):
    old = {"weights": random_unet().state_dict(), "unet": SMALL, "diffusion": DIFFUSION, "label_dropout": 0.1}
    (tmp_path / "m.pth").write_bytes(serialise(old))
    assert load_checkpoint(tmp_path / "m.pth", CPU).classes == list(CLASSES)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    model = random_unet()
    save_checkpoint(tmp_path / "a.pth", model.state_dict(), SMALL, DIFFUSION, 0.1)
    model.to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "b.pt", model.state_dict(), SMALL, DIFFUSION, 0.1)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pt").read_bytes()
    save_checkpoint(tmp_path / "a.pth", random_unet(seed=1).state_dict(), SMALL, DIFFUSION, 0.1)
    assert (tmp_path / "a.pth").read_bytes() != (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize(
    ("weights", "unet", "diffusion"),
    [
        (random_unet(channels=[16, 32]).state_dict(), SMALL, DIFFUSION),
        (random_unet(blocks=2).state_dict(), SMALL, DIFFUSION),
        ({}, SMALL, DIFFUSION),
        ([1, 2], SMALL, DIFFUSION),
        (random_unet().state_dict(), {**SMALL, "depth": 3}, DIFFUSION),
        (random_unet().state_dict(), {**SMALL, "channels": []}, DIFFUSION),
        (random_unet().state_dict(), {**SMALL, "channels": [12, 16]}, DIFFUSION),
        (random_unet().state_dict(), "unet", DIFFUSION),
        (random_unet().state_dict(), SMALL, {**DIFFUSION, "schedule": "quadratic"}),
        (random_unet().state_dict(), SMALL, {**DIFFUSION, "prediction": "score"}),
        (random_unet().state_dict(), SMALL, {"steps": 50}),
    ],
    ids=[
        "other-widths", "other-depth", "no-weights", "list-of-weights", "unknown-option", "no-channels", "groups", "text",
        "unknown-schedule", "unknown-prediction", "other-diffusion",
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, unet, diffusion):
    path = tmp_path / "m.pth"
    torch.save({"weights": weights, "unet": unet, "diffusion": diffusion, "label_dropout": 0.1}, path)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, CPU)
    message = str(caught.value)
    assert message.startswith(f"{path}: its weights don't fit the network that it describes (")
    assert message.endswith(f"); {REMEDY}")
    assert "\n" not in message


@pytest.mark.parametrize("guide", [{}, [1, 2], random_unet(blocks=2).state_dict()], ids=["no-weights", "list", "other-depth"])
def test_a_guide_that_does_not_fit_is_refused(tmp_path, guide):
    content = {"weights": random_unet().state_dict(), "unet": SMALL, "diffusion": DIFFUSION, "label_dropout": 0.1, "guide": guide}
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(UserError, match="its weights don't fit the network that it describes"):
        load_checkpoint(tmp_path / "m.pth", CPU)


def test_another_programs_checkpoint_is_refused(tmp_path):
    torch.save(random_unet().state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "m.pth", CPU)
    lacks = "diffusion, label_dropout, unet, weights"
    assert str(caught.value) == f"{tmp_path / 'm.pth'}: made by another program or version (it lacks {lacks}); {REMEDY}"
