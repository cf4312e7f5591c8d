"""The committed evaluator: that it is the one its card describes, what it is worth, and that nothing else passes for it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from ddpm.data.fashion_mnist import load_split
from ddpm.errors import UserError
from ddpm.evaluation.classifier import FEATURES, Classifier, load_classifier
from ddpm.evaluation.features import extract, extract_cached
from ddpm.files import file_sha256
from ddpm.tensor_files import load_tensors

CPU = torch.device("cpu")
CLASSIFIER = Path(__file__).resolve().parents[1] / "models/classifier.pth"
CARD = json.loads(CLASSIFIER.with_suffix(".json").read_text()) if CLASSIFIER.with_suffix(".json").exists() else {}


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(CLASSIFIER)


@pytest.fixture
def copy(tmp_path):
    """A copy of the committed files that may be spoilt."""
    for path in (CLASSIFIER, CLASSIFIER.with_suffix(".json")):
        shutil.copy(path, tmp_path)
    return tmp_path / CLASSIFIER.name


def test_the_committed_weights_are_those_of_their_card():
    assert file_sha256(CLASSIFIER) == CARD["sha256"]


@pytest.mark.slow
def test_accuracy_on_the_test_set(classifier, fashion_mnist, real_features):
    images, labels = load_split(fashion_mnist, "test")
    features, predicted = extract_cached(classifier, images, CPU, real_features[0].parent)
    accuracy = (predicted == labels).float().mean().item()
    assert accuracy >= 0.93
    assert accuracy == pytest.approx(CARD["test_accuracy"], abs=5e-4)
    assert features.std(0).min() > 0  # none of the features is dead


def test_the_features_know_unseen_images_as_well_as_training_images():
    seen, unseen = CARD["fid_train_half_against_train_half"], CARD["fid_test_against_train_half"]
    assert max(seen, unseen) <= 1.2 * min(seen, unseen)


def test_size_and_precision(classifier):
    parameters = sum(p.numel() for p in classifier.parameters())
    assert parameters == pytest.approx(0.5e6, rel=0.1)
    assert parameters == CARD["parameters"]
    on_disk = load_tensors(CLASSIFIER, {"weights"}, "")["weights"]
    assert {w.dtype for w in on_disk.values()} == {torch.float16, torch.int64}  # int64: batch norm's counters
    assert {w.dtype for w in classifier.state_dict().values()} == {torch.float32, torch.int64}
    assert CLASSIFIER.stat().st_size < 1.25e6
    assert all(torch.equal(w.float(), classifier.state_dict()[name].float()) for name, w in on_disk.items())


def test_it_is_frozen(classifier):
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())


def test_features_do_not_depend_on_the_batch(classifier, fashion_mnist):
    images = load_split(fashion_mnist, "test")[0][:60]
    features, predicted = extract(classifier, images, CPU, batch_size=60)
    assert features.shape == (60, FEATURES) and features.dtype == torch.float32
    assert predicted.shape == (60,) and predicted.dtype == torch.int64
    for batch_size in (1, 7, 59):
        others, classes = extract(classifier, images, CPU, batch_size)
        assert torch.allclose(others, features, rtol=0, atol=1e-5)
        assert torch.equal(classes, predicted)


def test_features_are_kept_for_the_next_time(classifier, fashion_mnist, tmp_path):
    images = load_split(fashion_mnist, "test")[0][:20]
    first = extract_cached(classifier, images, CPU, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, extract(classifier, images, CPU), strict=True))
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = extract_cached(classifier, images, CPU, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert file.stat().st_mtime_ns == written

    file.write_bytes(file.read_bytes()[:-1])  # damaged: made anew
    assert torch.equal(extract_cached(classifier, images, CPU, tmp_path)[0], first[0])
    assert file.stat().st_mtime_ns != written

    others = images.flip(0)
    assert torch.equal(extract_cached(classifier, others, CPU, tmp_path)[0], extract(classifier, others, CPU)[0])
    torch.manual_seed(0)
    stranger = Classifier().eval()
    assert torch.equal(extract_cached(stranger, images, CPU, tmp_path)[0], extract(stranger, images, CPU)[0])
    assert len(list(tmp_path.iterdir())) == 3


def test_without_the_weights(copy):
    copy.unlink()
    with pytest.raises(
        UserError,
        match=f"^{re.escape(f'{copy}: there is no such file; `python src/train_classifier.py --out {copy}` makes it')}$",
    ):
        load_classifier(copy)


def test_without_the_card(copy):
    card = copy.with_suffix(".json")
    card.unlink()
    line = f"{card}: there is no such file; `python src/train_classifier.py --out {copy}` makes it together with classifier.pth"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        load_classifier(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{}", '{"recipe": {}}', "\0"])
def test_with_a_card_that_is_none(copy, content):
    card = copy.with_suffix(".json")
    card.write_text(content)
    line = (
        f"{card}: lacks sha256, data or test_accuracy of classifier.pth; `python src/train_classifier.py --out {copy}` makes both"
    )
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        load_classifier(copy)


def test_with_another_hash_in_the_card(copy):
    card = copy.with_suffix(".json")
    card.write_text(json.dumps({**CARD, "sha256": "0" * 64}))
    line = f"{copy}: not the classifier that classifier.json describes (SHA-256 differs); FIDs would not compare"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        load_classifier(copy)


def test_one_of_another_data_set(copy):
    line = f"{copy}: trained on FashionMNIST, not on MNIST; set evaluate.classifier to auto"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        load_classifier(copy, "MNIST")


def test_with_the_weights_of_another_classifier(copy):
    torch.save({"weights": Classifier().half().state_dict()}, copy)
    with pytest.raises(UserError, match=r"not the classifier that classifier\.json describes \(SHA-256 differs\)"):
        load_classifier(copy)


def test_the_one_in_git_comes_from_there(tmp_path, monkeypatch):
    """Another training of it, on another machine, would measure otherwise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    shutil.copy(CLASSIFIER.with_suffix(".json"), "models")
    Path("models/classifier.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"; `git checkout models/classifier\.pth models/classifier\.json` restores it$"):
        load_classifier(Path("models/classifier.pth"))


@pytest.mark.parametrize("where", [0, 40, 0.01, 0.3, 0.6, 0.9, 0.999, -1])
def test_with_a_changed_byte(copy, where):
    data = bytearray(copy.read_bytes())
    position = int(where * len(data)) if isinstance(where, float) else where
    data[position] ^= 1
    copy.write_bytes(data)
    lines = (
        f"{copy}: not the classifier that classifier.json describes (SHA-256 differs); FIDs would not compare",
        f"{copy}: corrupt, or not a plain weights file; `python src/train_classifier.py --out {copy}` makes it",
    )
    with pytest.raises(UserError) as error:
        load_classifier(copy)
    assert str(error.value) in lines
