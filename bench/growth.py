"""How cost grows: training rate and memory against batch size and width; the sample stage's memory against its count.

Memory is a process's own peak (Linux's VmHWM; elsewhere it isn't measured), so every figure has a process of its own.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from contenders import NULL_CLASS, ROOT, SHAPE, Ours
from ddpm.params_file import load_params
from measure import own_environment, seconds, table

WIDTHS = ([24, 48], [48, 96], [96, 192], [192, 384])
BATCHES = (16, 32, 64, 128, 256, 512)
COUNTS = (1000, 10_000, 50_000)


def train_rate(batch: int, channels: list[int]) -> float:
    """Images/s of training steps, the best of three rounds."""
    p = load_params(ROOT / "params.yaml").train
    p = p.model_copy(update={"batch_size": batch, "model": p.model.model_copy(update={"channels": channels})})
    contender = Ours(p)
    contender.start(torch.device("cpu"))
    images, labels = torch.rand(batch, *SHAPE) * 2 - 1, torch.randint(NULL_CLASS, (batch,))
    contender.step(images, labels)
    times = max(1, 256 // batch)
    return batch / min(seconds(lambda: contender.step(images, labels), contender.device, times) for _ in range(3))


def train_cost(batch: int, channels: list[int]) -> dict:
    said, peak = apart(f"import growth; print(growth.train_rate({batch}, {channels}))", Path(__file__).parent)
    return {"images_a_second": float(said), "peak_mib": peak}


def sample_cost(count: int) -> dict:
    """Peak memory of the sample stage drawing `count` images in one denoising step each, in a copy of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "models"):
            shutil.copytree(ROOT / name, Path(folder, name))
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["sample"] |= {"count": count, "steps": 1}
        params["runtime"] |= {"device": "cpu"}
        Path(folder, "params.yaml").write_text(yaml.safe_dump(params))
        stage = "import runpy, sys; sys.path.insert(0, 'src'); runpy.run_path('src/sample.py', run_name='__main__')"
        return {"peak_mib": apart(stage, Path(folder))[1]}


def apart(code: str, folder: Path) -> tuple[str, float]:
    """What Python code prints in a process of its own, and its peak memory in MiB.

    (Not getrusage's: a process inherits that peak from the one that started it.)
    """
    code += "; import pathlib; p = pathlib.Path('/proc/self/status'); print('#status', p.read_text() if p.exists() else '')"
    environment = own_environment()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    said, status = done.stdout.split("#status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return said, int(peak[1]) / 1024 if peak else float("nan")


def run(full: bool) -> dict:
    batches, widths, counts = (BATCHES, WIDTHS, COUNTS) if full else (BATCHES[1:5:2], WIDTHS[:2], COUNTS[:2])
    default = load_params(ROOT / "params.yaml").train
    return {
        "batch": {str(b): train_cost(b, default.model.channels) for b in batches},
        "width": {str(w): train_cost(default.batch_size, w) for w in widths},
        "samples": {str(n): sample_cost(n) for n in counts},
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
