"""Presets: each is valid on top of the committed params, and applying one changes values and nothing else."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from ddpm.errors import UserError
from ddpm.params_file import apply_preset, load_params

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
COMMENT = re.compile(r"#.*")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def preset(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What the command does. Its imports take seconds, so only the tests of the command itself use it."""
    command = ["python", ROOT / "src/preset.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def leaves(section: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in section.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def values(path: Path) -> dict[str, object]:
    return leaves(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_changes_its_values_and_says_so(folder, path):
    if path.stem.startswith("colour"):  # for images of one's own
        text = (folder / "params.yaml").read_text()
        (folder / "params.yaml").write_text(
            text.replace("FashionMNIST  ", "mine  ", 1).replace("folder: null", "folder: /x  ", 1)
        )
    before, was = (folder / "params.yaml").read_text(), values(folder / "params.yaml")
    lines = apply_preset(path.stem)
    load_params(folder / "params.yaml")
    wanted = values(path)
    assert wanted.keys() <= was.keys()
    assert values(folder / "params.yaml") == {**was, **wanted}
    said = {line.partition(":")[0] for line in lines}
    assert said == {key for key in wanted if was[key] != wanted[key]}

    after = (folder / "params.yaml").read_text()
    assert COMMENT.findall(after) == COMMENT.findall(before)
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) == len(said)

    assert apply_preset(path.stem) == []
    assert (folder / "params.yaml").read_text() == after


def test_the_command_prints_what_changed(folder):
    done = preset(folder, "smoke")
    assert (done.returncode, done.stderr) == (0, "")
    after = (folder / "params.yaml").read_text()
    shutil.copy(ROOT / "params.yaml", folder)
    *changes, next_steps = done.stdout.splitlines()
    assert changes == apply_preset("smoke")
    assert next_steps.startswith("Next: `dvc repro`")
    assert (folder / "params.yaml").read_text() == after
    assert preset(folder, "smoke").stdout == "params.yaml has the values of smoke already\n"


def test_an_unknown_preset_is_named_beside_those_there_are(folder):
    before = (folder / "params.yaml").read_bytes()
    for arguments in ((), ("smoky",), ("smoke", "h100")):
        done = preset(folder, *arguments)
        assert done.returncode == 2
        assert all(path.stem in done.stderr for path in PRESETS)
    assert (folder / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("train:\n  steps: -1\n", ": train.steps: -1 should be"),
        ("train:\n  stepz: 5\n", ": train.stepz: there is no such key; did you mean steps?"),
        ("trains:\n  steps: 5\n", ": trains: there is no such key; did you mean train?"),
        ("train:\n  steps:\n    many: 5\n", ": train.steps: {'many': 5} should be a whole number"),
        ("train: 5\n", ": train: 5 should be a section of keys"),
        ("- train\n", ": has no sections"),
        ("", ": has no sections"),
        ("train:\n  steps: [\n", ", line 3: not YAML ("),
    ],
)
def test_a_preset_that_does_not_fit_changes_nothing(folder, content, fault):
    (folder / "presets/bad.yaml").write_text(content)
    before = (folder / "params.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        apply_preset("bad")
    assert str(caught.value).startswith(f"presets/bad.yaml{fault}")
    assert (folder / "params.yaml").read_bytes() == before


def test_the_command_says_in_one_line_what_is_wrong_with_a_preset(folder):
    (folder / "presets/bad.yaml").write_text("train:\n  steps: -1\n")
    before = (folder / "params.yaml").read_bytes()
    done = preset(folder, "bad")
    assert done.returncode == 1
    assert done.stderr.startswith("error: presets/bad.yaml: train.steps: -1 should be")
    assert (folder / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["colour32", "colour64"])
def test_a_preset_for_other_images_is_refused_for_fashion_mnist(folder, name):
    before = (folder / "params.yaml").read_text()
    with pytest.raises(UserError, match=r"colour\d\d\.yaml: data\.size: \d\d, but FashionMNIST is always 28×28 pixels"):
        apply_preset(name)
    assert (folder / "params.yaml").read_text() == before
