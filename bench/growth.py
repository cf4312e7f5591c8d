"""How cost grows: training rate and memory against batch size and width; the sample stage's memory against its count.

Memory is a process's own peak (Linux's VmHWM; elsewhere it isn't measured), so every figure has a process of its own.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from contenders import NULL_CLASS, ROOT, SHAPE, Ours
from ddpm.params import load_params
from measure import seconds, table

WIDTHS = ([24, 48], [48, 96], [96, 192], [192, 384])
BATCHES = (16, 32, 64, 128, 256, 512)
COUNTS = (1000, 10_000, 50_000)


def train_cost(batch: int, channels: list[int]) -> dict:
    """Images/s and peak memory of training, in this process."""
    p = load_params(ROOT / "params.yaml").train
    contender = Ours(p.model_copy(update={"model": p.model.model_copy(update={"channels": channels})}))
    contender.start(torch.device("cpu"))
    images, labels = torch.rand(batch, *SHAPE) * 2 - 1, torch.randint(NULL_CLASS, (batch,))
    contender.step(images, labels)
    times = max(1, 256 // batch)
    taken = min(seconds(lambda: contender.step(images, labels), contender.device, times) for _ in range(3))
    return {"images_a_second": batch / taken, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Of this process since its start. (Not getrusage's: a process inherits that peak from the one that started it.)"""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def sample_cost(count: int) -> dict:
    """Peak memory of the sample stage drawing `count` images in one denoising step each."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "models"):
            shutil.copytree(ROOT / name, Path(folder, name))
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["sample"] |= {"count": count, "steps": 1}
        Path(folder, "params.yaml").write_text(yaml.safe_dump(params))
        os.chdir(folder)
        sys.path.insert(0, "src")
        sys.argv = ["src/sample.py"]
        runpy.run_path("src/sample.py", run_name="__main__")
        return {"peak_mib": peak_mib()}


def apart(function: str, *arguments: object) -> dict:
    """The result of a function of this file, called in a new process."""
    code = f"import json, growth; print(json.dumps(growth.{function}(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(full: bool) -> dict:
    batches, widths, counts = (BATCHES, WIDTHS, COUNTS) if full else (BATCHES[1:5:2], WIDTHS[:2], COUNTS[:2])
    default = load_params(ROOT / "params.yaml").train
    return {
        "batch": {str(b): apart("train_cost", b, default.model.channels) for b in batches},
        "width": {str(w): apart("train_cost", default.batch_size, w) for w in widths},
        "samples": {str(n): apart("sample_cost", n) for n in counts},
    }


def report(result: dict) -> str:
    def part(name: str, rows: dict) -> str:
        cells = [[key, f"{r['images_a_second']:.0f}", f"{r['peak_mib']:.0f}"] for key, r in rows.items()]
        return table([name, "images/s", "peak memory, MiB"], cells)

    samples = [[f"{int(n):,}", f"{r['peak_mib']:.0f}"] for n, r in result["samples"].items()]
    return "\n\n".join(
        [
            part("training, batch size", result["batch"]),
            part("training, channels", result["width"]),
            table(["images sampled in one stage", "peak memory, MiB"], samples),
        ]
    )
