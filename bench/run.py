"""`make bench`, or `python bench/run.py [--full] [part …]`: this project beside its peers, measured on this machine.

Parts: throughput, step, growth, evaluations and quality, whose short form takes a quarter of an hour; baselines, guidance,
classes, cas, waits, scale, rates, samplers, seeds and ablations only run where they are named, or with --full, which takes some
eight hours for all. Each part leaves its figures in bench/results/, and all of those become the tables and plots of docs/ and
the README. `--report` only does the latter. Where someone's samples are garbage, the table says so, and the exit status is 1.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import ablations
import baselines
import cas
import classes
import evaluations
import gpu
import growth
import guidance
import models
import quality
import rates
import samplers
import scale
import seeds
import step
import throughput
import waits
from contenders import ROOT
from measure import GARBAGE, keep, kept, machine

SHORT = {"throughput": throughput, "step": step, "growth": growth, "evaluations": evaluations, "quality": quality}
PARTS = SHORT | {"baselines": baselines, "guidance": guidance, "classes": classes, "cas": cas}
PARTS |= {"waits": waits, "scale": scale, "rates": rates, "samplers": samplers, "seeds": seeds, "ablations": ablations}
TOLD = PARTS | {"models": models, "gpu": gpu}  # what publish.py and gpu.py have measured
PAGES = [ROOT / page for page in ("docs/RESULTS.md", "docs/ABLATIONS.md", "docs/OPERATIONS.md", "README.md")]
PICTURES = ROOT / "docs/images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help=", ".join(PARTS))
    parser.add_argument("--full", action="store_true", help="the long form, for docs/RESULTS.md")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the page from bench/results")
    options, spoilt = parser.parse_args(), []
    for name in [] if options.report else options.parts or (PARTS if options.full else SHORT):
        print(f"— {name}", flush=True)
        on, began = machine(), time.monotonic()  # before an edit can change the commit
        result = {"machine": on} | PARTS[name].run(options.full)
        result = {"minutes": round((time.monotonic() - began) / 60, 1)} | result | {"full": options.full}
        if options.full:
            keep(name, result)
            write_pages()
        print(told := PARTS[name].report(result), flush=True)
        if f"| {GARBAGE} |" in told:
            spoilt.append(name)
    if options.report:
        write_pages()
    if spoilt:
        sys.exit(f"blank images, or no numbers, among the samples of: {', '.join(spoilt)}")


def write_pages() -> None:
    """Put every part's table into its places, and draw its plot."""
    try:
        import matplotlib
    except ImportError:  # a machine lent for its GPU: what was kept is enough
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, part in TOLD.items():
        if not any(f"<!-- {name} -->" in page.read_text() for page in PAGES):
            sys.exit(f"no page has a place for {name} (<!-- {name} --> … <!-- /{name} -->)")
        result = kept(name)
        if result and hasattr(part, "plot"):
            figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
            part.plot(result, axes)
            axes.grid(which="both", alpha=0.2)
            figure.savefig(PICTURES / f"{name}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)
        for page in PAGES:
            page.write_text(filled(page, name, result))


def filled(page: Path, name: str, result: dict | None) -> str:
    """The page's text with what it says of a part between that part's markers, where it has them."""
    begin, end, text = f"<!-- {name} -->", f"<!-- /{name} -->", page.read_text()
    if begin not in text:
        return text
    content = section(name, result, os.path.relpath(PICTURES, page.parent))
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.S)


def section(name: str, result: dict | None, pictures: str) -> str:
    """What a page says of a part."""
    if result is None:
        return "Not measured yet."
    part = TOLD[name]
    picture = [f"![{part.__doc__}]({pictures}/{name}.png)"] if hasattr(part, "plot") else []
    source = [provenance(name, result)] if "machine" in result else []
    return "\n\n".join([part.report(result), *picture, *source])


def provenance(name: str, result: dict) -> str:
    m = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in m["versions"].items())
    command = f"`python bench/run.py --full {name}`, {result['minutes']} minutes"
    return f"<sub>{command}, {m['date']}, commit {m['commit']}; {m['processor']}; Python {m['python']}, {versions}.</sub>"


if __name__ == "__main__":
    main()
