"""What several processes gain: training by one and by two, a thread each, and from the volume of communication a forecast."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from contenders import ROOT
from ddpm.diffusion.unet import UNet
from ddpm.params_file import merge, parse_params
from measure import gflop, table

TRAINING = """
import json, sys, tempfile
from pathlib import Path

import torch

from ddpm.data.dataset import load_dataset
from ddpm.runtime.distributed import joined
from ddpm.params_file import load_params
from ddpm.training.loop import train
from ddpm.training.step import Execution
from measure import Rates

p = load_params().train.model_copy(update={"steps": int(sys.argv[1]), "report_every": 10**6})
with joined(torch.device("cpu")) as group, tempfile.TemporaryDirectory() as folder:
    data = load_dataset("FashionMNIST")
    train(p, data, Path(folder), rates := Rates(), Execution(torch.device("cpu"), group=group))
    if group.is_main:
        Path(sys.argv[2]).write_text(json.dumps(rates[2:]))
"""
FP32_BYTES = 4
PRESET = ROOT / "presets/h100.yaml"  # whose training on several GPUs is forecast
RATE = 97e12  # FLOP/s that it reached on one H200, at 512 images a step, as CUDA graphs (docs/RESULTS.md)
# What the forecast assumes of what connects GPUs; none of it is measured here.
LINK = {8: 450e9, 64: 50e9}  # bytes a second and GPU: NVLink within a node of 8, a 400 Gbit/s adapter each between nodes
LATENCY = 30e-6  # seconds of an all-reduce that has next to nothing to carry
BUCKET = 25 << 20  # bytes of gradients that DistributedDataParallel sends at once


def run(full: bool) -> dict:
    steps, repeats = (120, 5) if full else (60, 3)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for processes, values in rates.items():
            values.append(statistics.median(training_rates(processes, steps)))
            print(f"{processes} processes: {values[-1]:.0f} images/s", flush=True)
    return {
        "steps": steps,
        "repeats": repeats,
        "images_a_second": {str(n): statistics.median(values) for n, values in rates.items()},
    }


def training_rates(processes: int, steps: int) -> list[float]:
    """Images/s over every ten steps of so many processes with a thread each, the first twenty left out."""
    with tempfile.TemporaryDirectory() as folder:
        script, result = Path(folder, "training.py"), Path(folder, "rates.json")
        script.write_text(TRAINING)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'bench'}"}
        subprocess.run([*launcher, script, str(steps), result], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, check=True)
        return json.loads(result.read_text())


def cost() -> dict:
    """The preset's parameters, its global batch, and the GFLOP of an image's forward and backward pass."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    list(merge(params, yaml.safe_load(PRESET.read_text())))  # in place; it yields what it changed
    p = parse_params(yaml.safe_dump(params), ROOT / "params.yaml").train
    model, n = UNet(**p.model.model_dump()), 8
    x, t, y = torch.randn(n, 1, 28, 28), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    work = gflop(lambda: model(x, t, y).square().mean().backward()) / n
    return {"parameters": sum(w.numel() for w in model.parameters()), "batch": p.batch_size, "gflop_an_image": work}


def forecast(model: dict, gpus: int) -> tuple[float, float, float]:
    """Seconds of computing and of communicating in a step, and the share of the GPUs' time that computes.

    A ring passes 2 (n - 1) / n of the gradients through every GPU; nothing is taken to overlap.
    """
    computing = model["gflop_an_image"] * 1e9 * model["batch"] / gpus / RATE
    volume = FP32_BYTES * model["parameters"]
    buckets = -(-volume // BUCKET)
    communicating = 2 * (gpus - 1) / gpus * volume / LINK[gpus] + buckets * LATENCY
    return computing, communicating, computing / (computing + communicating)


def report(result: dict) -> str:
    one, two = (result["images_a_second"][n] for n in ("1", "2"))
    measured = table(
        ["processes, a thread each", "images/s", "efficiency"],
        [["1", f"{one:.0f}", ""], ["2", f"{two:.0f}", f"{two / (2 * one):.0%}"]],
    )
    model, rows = cost(), []
    for gpus in LINK:
        computing, communicating, efficiency = forecast(model, gpus)
        micro = [f"{seconds * 1e6:,.0f} µs" for seconds in (computing, communicating)]
        rows.append([str(gpus), str(model["batch"] // gpus), *micro, f"{efficiency:.0%}"])
    header = ["GPUs", "images each", "computing", "communicating", "efficiency"]
    return f"""The default model on two cores, the same batch shared by both, gradients by gloo:

{measured}

A forecast, not a measurement, for `presets/h100.yaml`, whose gradients have {FP32_BYTES * model["parameters"] / 1e6:.1f} MB, on \
as many GPUs as share a step's batch:

{table(header, rows)}

It assumes the {RATE / 1e12:.0f} TFLOP/s that it reached on one H200 with 512 images a step and CUDA graphs, which fewer \
images would not, nor several processes, which have no such graphs; links of {LINK[8] / 1e9:.0f} GB/s within eight and \
{LINK[64] / 1e9:.0f} GB/s between more, {LATENCY * 1e6:.0f} µs an all-reduce, a ring, and no overlap of computing and \
communicating. On GPUs the default model gains nothing: launching its kernels is what takes the time."""
