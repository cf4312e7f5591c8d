"""`make report`: compare experiments on one page that needs no network, output/report.html.

`python src/report.py few-steps sigmoid` takes the experiments of these names, which `make compare` lists; without names it takes
the best four.
"""

import argparse
import base64
import csv
import io
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import dvc.api
import matplotlib
import yaml
from dvc.exceptions import DvcException
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from ddpm.errors import UserError
from ddpm.experiments import WORKSPACE, Experiment, comparable, experiments_and_runs
from ddpm.files import write_atomic
from ddpm.paths import ANIMATION, GRID, NEIGHBOURS, OUTPUT, PIPELINE, PLOTS, STRIP, project_root
from ddpm.runtime.cli import clean_errors
from ddpm.tracking.connection import run_address

PAGE = OUTPUT / "report.html"
MOST = 4  # experiments, unless they are named
NEAREST = "distance to the nearest training image, divided by the same for test images; far below 1 means copies"
METRICS: dict[str, tuple[str, bool | None]] = {  # what it means, and whether lower is better; None: neither
    "fid": ("distance to the training images", True),
    "fid_test": ("distance to the test images", True),
    "kid": ("kernel distance to the training images", True),
    "precision": ("share of samples that look real", False),
    "recall": ("share of real images that are like samples", False),
    "density": ("how densely real images surround the samples", False),
    "coverage": ("share of real images with a sample close to them", False),
    "class_accuracy": ("share of samples recognised as the class asked for", False),
    "c2st_auc": ("how well a network tells samples from test images; 0.5: not at all, 1: always", True),
    "c2st_accuracy": ("share of samples and test images that the same network assigns to the right set", True),
    "nearest_neighbour_ratio": (NEAREST, None),
    "val_loss": ("validation loss", None),
    "parameters": ("number of the model's weights", None),
}
PICTURES = {
    GRID.as_posix(): "Samples, one row per class",
    ANIMATION.as_posix(): "How samples emerge from noise",
    STRIP.as_posix(): "The same, step by step",
    NEIGHBOURS.as_posix(): "The samples closest to a training image, next to it",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for colour-blind readers, too
GREY = "#7d8590"  # of axes and text; readable on white and on black


@dataclass
class Column:
    """What the page shows of one experiment, in a column of its tables."""

    experiment: Experiment
    colour: str
    pictures: dict[str, str]  # data: URLs, by path
    curves: dict[str, dict[str, list[float]]]  # "train" and "validation": the columns of these tables, by name
    run: str = ""  # name of the MLflow run that evaluated it
    address: str = ""  # of that run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="of experiments, as `make compare` lists them (default: the best four)")
    names = parser.parse_args().names
    found, runs = experiments_and_runs()
    columns = []
    for e, colour in zip(chosen(names, found), cycle(COLOURS), strict=False):
        column = Column(e, colour, pictures(e.revision), curves(e.revision))
        if run := runs.get(e.samples_md5 or ""):
            column.run, column.address = run.info.run_name, run_address(project_root(), run)
        columns.append(column)
    write_atomic(PAGE, page(columns).encode())
    print(f"{PAGE}: {', '.join(c.experiment.name for c in columns)}")


def chosen(names: list[str], found: list[Experiment]) -> list[Experiment]:
    """The experiments of these names, or the best. Raises UserError if one isn't found, or none is finished."""
    finished = [e for e in found if "fid" in e.metrics]
    known = {key: e for e in finished for key in (e.revision, e.revision[:7], e.name)}
    if missing := [name for name in names if name not in known]:
        raise UserError(f"no finished experiment is called {missing[0]}; `make compare` lists them")
    if not finished:
        raise UserError("there is nothing to show yet; `dvc repro` computes the first metrics")
    return [known[name] for name in dict.fromkeys(names)] or next(iter(comparable(finished).values()))[:MOST]


def pictures(revision: str) -> dict[str, str]:
    """The pictures of a revision as data: URLs, by path."""
    contents = {path: read(path, revision) for path in PICTURES}
    return {
        path: f"data:image/{Path(path).suffix[1:]};base64,{base64.b64encode(content).decode()}"
        for path, content in contents.items()
        if content
    }


def curves(revision: str) -> dict[str, dict[str, list[float]]]:
    """The columns of its tables of losses, by "train" and "validation"."""
    found = {}
    for name in ("train", "validation"):
        if content := read(f"{PLOTS.as_posix()}/{name}.tsv", revision):
            reader = csv.DictReader(io.StringIO(content.decode()), delimiter="\t")
            rows = list(reader)
            found[name] = {key: [float(row[key]) for row in rows] for key in reader.fieldnames or ()}
    return found


def read(path: str, revision: str) -> bytes | None:
    """A file of a revision; None if neither git nor DVC's cache has it."""
    try:
        return dvc.api.read(path, rev=None if revision == WORKSPACE else revision, mode="rb")
    except (DvcException, OSError):
        return None


def page(columns: list[Column]) -> str:
    """The HTML page."""
    alike = len({(c.experiment.judged_by, c.experiment.params.get("sample.count")) for c in columns}) == 1
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        columns=columns,
        data_sets=sorted({c.experiment.data_set for c in columns}),
        stages=stages(),
        params=differing([c.experiment.params for c in columns]),
        metrics=metric_rows([c.experiment.metrics for c in columns], alike),
        comparable=alike,
        charts=charts(columns),
        pictures=PICTURES,
    )


def stages() -> dict[str, str]:
    """What each stage makes, as dvc.yaml describes it."""
    try:
        return {name: stage["desc"] for name, stage in yaml.safe_load(PIPELINE.read_text("utf-8"))["stages"].items()}
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        raise UserError(f"{PIPELINE}: missing here, or not readable; run from the repository's root") from None


def differing(params: list[dict]) -> dict[str, list]:
    """The parameters whose values differ between experiments, with the value of each experiment."""
    names = dict.fromkeys(name for p in params for name in p)
    rows = {name: [p.get(name) for p in params] for name in names if not name.startswith("runtime.")}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def metric_rows(metrics: list[dict], comparable: bool) -> list[dict]:
    """One row per metric: the values as text. If they are `comparable`, also which is the best, and what real images score."""
    rows = []
    for name, (meaning, lower_is_better) in METRICS.items():
        values = [m.get(name) for m in metrics]
        known = [value for value in values if value is not None]
        if not known:
            continue
        ranked = comparable and lower_is_better is not None and len(set(known)) > 1
        best = (min if lower_is_better else max)(known) if ranked else None
        reals = [m[f"{name}{end}"] for m in metrics for end in ("_floor", "_real") if f"{name}{end}" in m]
        real = reals[0] if reals and comparable else None
        rows.append(
            {
                "name": name,
                "meaning": meaning,
                "cells": [(as_text(value), value is not None and value == best) for value in values],
                "real": as_text(real),
            }
        )
    return rows


def as_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5f}" if abs(value) < 0.01 else f"{value:.4g}"


def charts(columns: list[Column]) -> dict[str, str]:
    """The charts as inline SVG, by title."""
    drawn = {"FID, and what real images score (lower is better)": fid_chart(columns)}
    needed = {"loss", "loss_quarter1", "loss_quarter4"}
    with_curves = [c for c in columns if len(c.curves) == 2 and c.curves["validation"].keys() >= needed]
    if with_curves:
        drawn["Loss of training (pale) and of validation (with dots)"] = loss_chart(with_curves)
        drawn["Validation loss by quarter of the timesteps, from hardly any noise to pure noise"] = quarters_chart(with_curves)
    return drawn


def fid_chart(columns: list[Column]) -> str:
    drawing = Figure(figsize=(7, 0.9 + 0.42 * len(columns)), layout="constrained")
    axes = drawing.subplots()
    for row, c in enumerate(columns):
        m = c.experiment.metrics
        axes.plot(m["fid"], -row, "o", color=c.colour, markersize=9)
        axes.annotate(f"{m['fid']:.3g}", (m["fid"], -row), (9, -3.5), textcoords="offset points", color=c.colour)
        if "fid_floor" in m:
            axes.plot([m["fid_floor"], m["fid"]], [-row, -row], color=c.colour, alpha=0.35)
            axes.plot(m["fid_floor"], -row, "|", color=GREY, markersize=16, markeredgewidth=2)
    axes.set(xscale="log", xlabel="FID", yticks=[-row for row in range(len(columns))], ylim=(0.6 - len(columns), 0.5))
    axes.set_yticklabels([c.experiment.name for c in columns], parse_math=False)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)
    return svg(drawing)


def loss_chart(columns: list[Column]) -> str:
    drawing = Figure(figsize=(7, 3.6), layout="constrained")
    axes = drawing.subplots()
    for c, width in zip(columns, line_widths(columns), strict=True):
        train, validation = c.curves["train"], c.curves["validation"]
        axes.plot(train["step"], train["loss"], color=c.colour, alpha=0.3, linewidth=width / 2)
        axes.plot(validation["step"], validation["loss"], "o-", color=c.colour, linewidth=width, markersize=width + 2)
    axes.set(yscale="log", xlabel="step", ylabel="loss")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return svg(drawing)


def quarters_chart(columns: list[Column]) -> str:
    drawing = Figure(figsize=(7, 4.4), layout="constrained")
    for i, axes in enumerate(drawing.subplots(2, 2, sharex=True).flat, start=1):
        for c, width in zip(columns, line_widths(columns), strict=True):
            curve = c.curves["validation"]
            axes.plot(curve["step"], curve[f"loss_quarter{i}"], "o-", color=c.colour, markersize=width + 1, linewidth=width)
        axes.set(yscale="log", title=("first", "second", "third", "last")[i - 1] + " quarter")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    drawing.supxlabel("step", color=GREY, fontsize="medium")
    drawing.supylabel("loss", color=GREY, fontsize="medium")
    return svg(drawing)


def line_widths(columns: list[Column]) -> list[float]:
    """From thick to thin, so that all curves can be seen where they are the same: experiments may share a model."""
    return [1.5 + 1.5 * (len(columns) - 1 - i) for i in range(len(columns))]


def svg(drawing: Figure) -> str:
    """The figure as an <svg> element for a light or dark page, with text that can be selected."""
    for axes in drawing.axes:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(GREY)
        axes.tick_params(which="both", colors=GREY)
        axes.grid(which="major", color=GREY, alpha=0.2)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(GREY)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}):
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    markup = buffer.getvalue()
    return markup[markup.index("<svg") :]


if __name__ == "__main__":
    with clean_errors():
        main()
