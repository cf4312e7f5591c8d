"""`python release/publish.py make OUT --preset h100 --data FOLDER`: make the model that comes with the repository.

Made for a machine with a GPU that has neither a network nor DVC nor MLflow, and of the other packages only what the stages
import. In a copy of the repository it takes Fashion-MNIST's four .gz files from FOLDER, trains, samples, evaluates and measures,
and writes seven files to OUT: the weights in half precision, their card, 10 000 samples, pictures and curves, MLflow's journals,
results of the bench, and a log. The guidance is not the preset's, but the best of the bench's sweep. After an interruption
(`timeout 9m …`) the same command resumes; after a change of the code or the preset it starts over.

`python release/publish.py take OUT`, in your own checkout, copies all of that to where the repository has it: models/pretrained,
docs/ and bench/results.

`python release/publish.py judge`, there too, draws and judges the repository's model once more, by its preset's sampling: after a
change of the sampling or of the metrics. On two slow cores that takes more than an hour; an interrupted one resumes.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import jinja2
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

import classes  # noqa: E402
import run as bench  # noqa: E402
from ddpm import paths  # noqa: E402
from ddpm.checkpoint import load_checkpoint  # noqa: E402
from ddpm.errors import UserError  # noqa: E402
from ddpm.files import file_sha256, write_atomic  # noqa: E402
from ddpm.params_file import merge  # noqa: E402
from ddpm.paths import MODEL  # noqa: E402
from ddpm.runtime.cli import between, clean_errors  # noqa: E402
from ddpm.runtime.run_folder import fingerprint  # noqa: E402
from ddpm.tensor_files import serialise  # noqa: E402
from measure import RESULTS, keep, kept, machine, own_environment  # noqa: E402
from models import table_of_metrics  # noqa: E402

COPIED = ("src", "bench", "release", "presets", "models", "docs", "README.md", "params.yaml")
FINGERPRINTED = ("src", "bench", "release", "models/classifier.pth")
SWEEP, PARTS = "guidance", ("classes", "cas")
PRESETS = ("h100", "smoke")  # whose model knows classes
KEPT = (paths.PRETRAINED.name, paths.PRETRAINED_CARD.name, "runs.zip", paths.PRETRAINED_SAMPLES.name)
MADE = (*KEPT, "pictures.zip", "results.zip")
PICTURES = ("output/*.png", "output/*.gif", "output/plots/*.tsv")
PUBLISHED_PICTURES = (paths.GRID, paths.ANIMATION, paths.NEIGHBOURS)
ENOUGH = 10_000  # samples; a run with fewer is a trial, which skips the bench
LIMIT = 16 << 20  # bytes of a file in OUT
NOWHERE = "http://127.0.0.1:9"  # no MLflow answers there, so every run keeps its journal


class Work:
    """The copy of the repository, the names of the steps finished in it, and the seconds of each step over all attempts."""

    def __init__(self, preset: str | None, data: Path | None, count: int):
        settings = yaml.safe_load((ROOT / "params.yaml").read_text())
        if preset:
            list(merge(settings, yaml.safe_load((ROOT / f"presets/{preset}.yaml").read_text())))
        settings["sample"]["count"] = count
        settings["data"]["folder"] = None
        self.root = ROOT / ".cache" / f"publish-{fingerprint(settings, code_files())}"
        if not self.root.exists():
            half = self.root.with_suffix(".part")
            shutil.rmtree(half, ignore_errors=True)
            copy(ROOT, half)
            half.rename(self.root)
        self.settings, self.log = settings, self.root / "publish.log"
        self.path = self.root / "done.json"
        self.seconds, self.done = json.loads(self.path.read_text()) if self.path.exists() else ({}, [])

    def step(self, name: str, *command: str) -> None:
        """Run a program of the copy, unless this step is finished. If we are stopped, it gets SIGTERM and resumes next time."""
        if name in self.done:
            return
        environment = own_environment()
        environment |= {"MLFLOW_TRACKING_URI": NOWHERE, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        self.say(f"{name}: python {' '.join(command)}")
        began = time.monotonic()
        with self.log.open("ab") as log:
            process = subprocess.Popen([sys.executable, *command], cwd=self.root, env=environment, stdout=log, stderr=log)
            try:
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
            finally:
                self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - began
                self.save()
        if status:
            tail = self.log.read_text(errors="replace").splitlines()[-1]
            raise UserError(f"{name} ended with status {status}: {tail}; {self.log} has the rest")
        self.say(f"{name}: {self.seconds[name]:.1f} s")
        self.finished(name)

    def write_params(self, folder: Path | None = None, count: int | None = None) -> None:
        """Write the copy's params.yaml for the next step. Only the download gets `folder`, which exists on this machine alone."""
        self.settings["sample"]["count"] = count or self.settings["sample"]["count"]
        content = {**self.settings, "data": {**self.settings["data"], "folder": folder and str(folder.resolve())}}
        (self.root / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def finished(self, name: str) -> None:
        self.done.append(name)
        self.save()

    def save(self) -> None:
        write_atomic(self.path, json.dumps([self.seconds, self.done]).encode())

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def evaluated(self, name: str, count: int, *model: str) -> dict[str, float]:
        """The metrics of `count` samples of the current model, or of the file `model`."""
        path = self.root / f"{name}.json"
        if not path.exists():
            self.write_params(count=count)
            self.step(f"{name}: sample", "src/sample.py", *model)
            self.step(f"{name}: evaluate", "src/evaluate.py")
            shutil.copy(self.root / paths.EVALUATION_METRICS, path)
        return {metric: value for metric, value in json.loads(path.read_text()).items() if not isinstance(value, str)}

    def measure(self, part: str) -> None:
        self.step(f"bench: {part}", "bench/run.py", "--full", part)

    def results(self) -> list[Path]:
        """The files of the parts of the bench that were measured here; the copy also holds older ones."""
        measured = [part for part in (SWEEP, *PARTS) if f"bench: {part}" in self.done]
        paths = [RESULTS / f"{part}.json" for part in measured] + ([classes.PICTURE] if "classes" in measured else [])
        return [self.root / path.relative_to(ROOT) for path in paths]


def make(out: Path, preset: str | None, data: Path | None, count: int) -> None:
    work = Work(preset, data, count)
    on, p = machine(), work.settings["train"]
    work.say(f"{on['processor']}; PyTorch {on['versions']['torch']}; in {work.root}")
    work.write_params(data)
    work.step("download", "src/download.py")
    work.write_params(count=count)
    work.step("train", "src/train.py")
    model = work.root / MODEL
    if count == ENOUGH:
        publish(work, {"params": work.settings})
        work.measure(SWEEP)
        tried = json.loads((work.root / f"bench/results/{SWEEP}.json").read_text())["rows"]
        work.settings["sample"]["guidance_scale"] = float(min(tried, key=lambda scale: tried[scale]["fid"]))
    as_trained = work.evaluated("as trained", count)
    if "runs" not in work.done:
        pack_runs(work.root, work.root / "runs.zip")
        work.finished("runs")
    if "half" not in work.done:
        content = torch.load(model, weights_only=True)
        for part in ("weights", "guide"):
            content[part] = {name: w.half() if w.is_floating_point() else w for name, w in content[part].items()}
        write_atomic(model, serialise(content))
        work.finished("half")
    metrics = work.evaluated("in half precision", count)  # last, because its samples and pictures are published
    card = {
        "preset": preset or "default",
        "device": on["processor"],
        "date": on["date"],
        "commit": on["commit"],
        "versions": {"python": on["python"], "torch": on["versions"]["torch"]},
        "seconds": {name: round(value, 1) for name, value in work.seconds.items()},
        "parameters": sum(w.numel() for w in torch.load(model, weights_only=True)["weights"].values()),
        "images_seen": p["steps"] * p["batch_size"],
        "sha256": file_sha256(model),
        "bytes": model.stat().st_size,
        "samples": count,
        "metrics": metrics | json.loads((work.root / paths.TRAIN_METRICS).read_text()),
        "metrics_as_trained": as_trained,
        "curves": {split: curve(work.root / f"output/plots/{split}.tsv") for split in ("train", "validation")},
        "params": work.settings,
    }
    publish(work, card)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(work.root / "output/samples.npz", work.root / paths.PRETRAINED_SAMPLES)
    for path in (paths.PRETRAINED, paths.PRETRAINED_CARD, paths.PRETRAINED_SAMPLES, "runs.zip", work.log):
        shutil.copy(work.root / path, out)
    pack(out / "pictures.zip", work.root, [path for pattern in PICTURES for path in work.root.glob(pattern)])
    pack(out / "results.zip", work.root, work.results())
    for part in PARTS if count == ENOUGH else ():  # after the model, which is safe if time runs out
        work.measure(part)
        pack(out / "results.zip", work.root, work.results())
    work.say(f"done in {sum(work.seconds.values()):.0f} s; all of it is in {out}")
    shutil.copy(work.log, out)
    for path in out.iterdir():
        if path.stat().st_size > LIMIT:
            print(f"warning: {path} has {path.stat().st_size:,} bytes, more than {LIMIT:,}", file=sys.stderr)
    print(table_of_metrics({card["preset"]: card}))


def publish(work: Work, card: dict) -> None:
    """Put the current model and its card where the copy's bench finds them."""
    (work.root / paths.PRETRAINED_FOLDER).mkdir(exist_ok=True)
    shutil.copy(work.root / MODEL, work.root / paths.PRETRAINED)
    (work.root / paths.PRETRAINED_CARD).write_text(json.dumps(card, indent=1) + "\n")


def curve(path: Path) -> list[tuple[int, float]]:
    """About 300 of the steps and their losses, without the loss before the first step."""
    with path.open() as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file, delimiter="\t") if row["step"] != "0"]
    return rows[:: max(1, len(rows) // 300)]


def pack_runs(root: Path, archive: Path) -> None:
    """Archive the runs that wait for MLflow in the copy, oldest first, without the model: git has it already."""
    folders = [path.parent for path in (root / ".resume").glob("unshipped-*/journal.jsonl")]
    staged = root / "runs"
    shutil.rmtree(staged, ignore_errors=True)
    for n, folder in enumerate(sorted(folders, key=started)):
        shutil.copytree(folder, staged / str(n))
        journal = staged / str(n) / "journal.jsonl"
        lines = [line for line in journal.read_text().splitlines() if MODEL.name not in json.loads(line).get("artifact", "")]
        journal.write_text("".join(f"{line}\n" for line in lines))
        for path in (staged / str(n) / "outbox").glob(f"*/{MODEL.name}"):
            path.unlink()
    pack(archive, staged, sorted(walk(staged)))


def started(folder: Path) -> int:
    """The time when the run in the folder began, in ms."""
    first, *_ = (folder / "journal.jsonl").read_text().splitlines()
    return json.loads(first)["start"]["time"]


def copy(repository: Path, to: Path) -> None:
    """Copy everything that making a model needs."""
    to.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (repository / name).is_dir():
            shutil.copytree(repository / name, to / name)
        else:
            shutil.copy(repository / name, to)


def code_files() -> list[Path]:
    """The files that decide what is made, besides parameters and data; `make` starts over if one of them changes."""
    files = [path for name in FINGERPRINTED for path in sorted(walk(ROOT / name))]
    return [path for path in files if path.parent != RESULTS]


def walk(path: Path) -> list[Path]:
    """The file, or all files of the folder and its sub-folders, without compiled ones."""
    files = path.rglob("*") if path.is_dir() else [path]
    return [file for file in files if file.is_file() and file.suffix != ".pyc"]


def pack(archive: Path, root: Path, files: list[Path]) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            packed.write(path, path.relative_to(root))


def take(out: Path) -> None:
    """Copy what `make` wrote to OUT into this checkout. Raises UserError, and changes nothing, if OUT is incomplete."""
    if missing := [name for name in MADE if not (out / name).is_file()]:
        raise UserError(f"{out}: lacks {', '.join(missing)}; `make` writes it there")
    try:
        card = json.loads((out / "card.json").read_text())
        for name in (name for name in MADE if name.endswith(".zip")):
            with zipfile.ZipFile(out / name) as packed:
                if damaged := packed.testzip():
                    raise zipfile.BadZipFile(damaged)
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{out}: corrupt ({error}); copy it again") from None
    if file_sha256(out / "fashion_ddpm.pth") != card["sha256"]:
        raise UserError(f"{out / 'fashion_ddpm.pth'}: not the file that {out / 'card.json'} describes; copy both again")
    load_checkpoint(out / "fashion_ddpm.pth", torch.device("cpu"))
    folder = ROOT / paths.PRETRAINED_FOLDER
    folder.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(out / name, folder)
    for part in (SWEEP, *PARTS):
        (RESULTS / f"{part}.json").unlink(missing_ok=True)  # it describes the previous model
    with zipfile.ZipFile(out / "results.zip") as archive:
        archive.extractall(ROOT)
    with zipfile.ZipFile(out / "pictures.zip") as archive:
        for path in PUBLISHED_PICTURES:
            (ROOT / f"docs/images/pretrained-{path.name}").write_bytes(archive.read(path.as_posix()))
    write_card_pages(card)
    print(f"{folder} has the model; `git diff --stat` shows what else is new")
    if missing := [part for part in (SWEEP, *PARTS) if kept(part) is None]:
        print(f"not measured yet: `python bench/run.py --full {' '.join(missing)}` does it")


def judge(data: Path | None) -> None:
    """Draw and judge the model that the repository has, as its preset says now, and renew its card, pictures and pages."""
    card = json.loads((ROOT / paths.PRETRAINED_CARD).read_text())
    work = Work(card["preset"], data, ENOUGH)
    work.write_params(data)
    work.step("download", "src/download.py")
    metrics, on = work.evaluated("judged", ENOUGH, str(paths.PRETRAINED)), machine()
    of_training = {name: card["metrics"][name] for name in ("train_loss", "val_loss", "parameters")}
    card.setdefault("metrics_when_made", card["metrics"])
    card["metrics"] = metrics | of_training
    card["params"]["sample"] = work.settings["sample"]
    card["judged"] = {"device": on["processor"], "torch": on["versions"]["torch"], "date": on["date"]}
    (ROOT / paths.PRETRAINED_CARD).write_text(json.dumps(card, indent=1) + "\n")
    shutil.copy(work.root / paths.SAMPLES, ROOT / paths.PRETRAINED_SAMPLES)
    for path in PUBLISHED_PICTURES:
        shutil.copy(work.root / path, ROOT / f"docs/images/pretrained-{path.name}")
    write_card_pages(card)


def write_card_pages(card: dict) -> None:
    keep("models", (kept("models") or {}) | {card["preset"]: card})
    template = jinja2.Template((ROOT / "release/card.md.j2").read_text(), keep_trailing_newline=True)
    page = template.render(card=card, metrics=table_of_metrics({card["preset"]: card}))
    (ROOT / paths.PRETRAINED_FOLDER / "README.md").write_text(page)
    bench.write_pages()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="train, measure and pack")
    making.add_argument("out", type=Path, metavar="OUT", help="the folder for what it makes")
    making.add_argument("--preset", choices=PRESETS)
    making.add_argument("--data", type=Path, metavar="FOLDER", help="with Fashion-MNIST's .gz files; else it is downloaded")
    making.add_argument(
        "--count", type=between(10, ENOUGH), default=ENOUGH, help="samples (10000); fewer are a trial, without bench"
    )
    taking = commands.add_parser("take", help="put it into this checkout")
    taking.add_argument("out", type=Path, metavar="OUT")
    judging = commands.add_parser("judge", help="draw and judge the repository's model again, as its preset says now")
    judging.add_argument("--data", type=Path, metavar="FOLDER", help="with Fashion-MNIST's .gz files; else it is downloaded")
    options = parser.parse_args()
    if options.command == "make":
        make(options.out, options.preset, options.data, options.count)
    elif options.command == "take":
        take(options.out)
    else:
        judge(options.data)


if __name__ == "__main__":
    with clean_errors():
        main()
