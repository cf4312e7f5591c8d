"""Which experiments `make compare` and `make report` rank together."""

import re
import runpy
from pathlib import Path

import pytest

from ddpm.experiments import Experiment, comparable
from ddpm.tracking.ranking import Evaluation, is_better

ROOT = Path(__file__).resolve().parents[1]


def judged(name: str, fid: float, judged_by: tuple[str, str] = ("data", "evaluator"), data: str = "FashionMNIST") -> Experiment:
    params = {"data.name": data, "sample.count": 5000, "sample.steps": 10}
    return Experiment(name, name, params, {"fid": fid, "fid_floor": 0.1}, f"samples of {name}", judged_by)


FOUND = [
    judged("first", 0.5),
    judged("second", 0.6),
    judged("re-judged", 0.2, ("data", "another evaluator")),
    judged("sprites", 0.1, ("sprites", "evaluator of sprites"), "sprites"),
    Experiment("waiting", "waiting", {"data.name": "sprites"}, state="queued"),
]


def test_figures_of_different_data_sets_or_evaluators_are_not_ranked_together(monkeypatch, capsys):
    monkeypatch.setattr("ddpm.experiments.experiments_and_runs", lambda: (FOUND, {}))
    monkeypatch.setattr("sys.argv", ["compare.py"])
    runpy.run_path(str(ROOT / "src/compare.py"))["main"]()
    names = r"(★ )?\b(first|second|re-judged|sprites|waiting|FashionMNIST \(.*\))(?= |$)"
    shown = ["".join(found) for line in capsys.readouterr().out.splitlines() for found in re.findall(names, line.strip())]
    assert shown == [
        "FashionMNIST (data data, evaluator evaluat)", "★ first", "second", "FashionMNIST (data data, evaluator another)",
        "★ re-judged", "sprites", "★ sprites", "waiting",
    ]  # fmt: skip


def test_one_group_needs_no_title():
    assert list(comparable(FOUND[:2])) == ["FashionMNIST"]


@pytest.mark.parametrize(
    ("change", "better"),
    [
        ({}, False),
        ({"fid": 0.4}, True),
        ({"fid": 0.6}, False),
        ({"fid": 0.4, "samples": 2000}, True),
        ({"fid": 0.6, "samples": 2000}, False),
        ({"fid": 0.4, "samples": 999}, False),  # fewer raise the FID, but they also say less
        ({"fid": 0.4, "evaluator": "another"}, False),
        ({"fid": 0.4, "data": "another"}, False),
        ({"fid": 0.4, "data": None}, True),  # of a version that didn't log it
    ],
)
def test_better_is_a_lower_fid_of_at_least_as_many_samples_by_the_same_judge(change, better):
    old = {"fid": 0.5, "samples": 1000, "evaluator": "e", "data": "d"}
    assert is_better(Evaluation(**{**old, **change}), Evaluation(**old)) == better
