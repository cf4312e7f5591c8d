"""The README's figures are those of the committed run, and what it names exists."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
METRICS = json.loads((ROOT / "output/metrics/evaluate.json").read_text())
REAL = {  # the same figure for real images, where there is one
    "fid": "fid_floor",
    "fid_test": "fid_test_floor",
    "kid": "kid_floor",
    "precision": "precision_real",
    "recall": "recall_real",
    "density": "density_real",
    "coverage": "coverage_real",
    "class_accuracy": "class_accuracy_real",
    "c2st_auc": "c2st_auc_real",
}


@pytest.mark.parametrize("name", REAL)
def test_the_table_holds_the_committed_figures(name):
    digits = 6 if name == "kid" else 4
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[-2:] == [f"{METRICS[name]:.{digits}f}", f"{METRICS[REAL[name]]:.{digits}f}"]


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_tests_that_hold_the_promises_exist():
    page, file = (ROOT / "docs/OPERATIONS.md").read_text(), ""
    named = re.findall(r"`(?:(test_\w+\.py))?(?:::(test_\w+))?`", page)
    assert len([test for _, test in named if test]) > 20
    for name, test in named:
        file = name or file
        if file:
            text = (ROOT / "tests" / file).read_text()
            assert f"def {test}(" in text if test else text, f"{file}::{test}"


def test_make_targets_that_it_names_exist():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.M))
    named = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
    assert {first or second for first, second in named} <= targets
    assert "test-fast" in targets
