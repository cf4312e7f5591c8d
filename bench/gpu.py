"""`python bench/gpu.py`: what a GPU makes of this project and its peers, in one command of six minutes or so.

Its table comes last. It needs data/FashionMNIST/raw, and neither DVC nor MLflow (a training keeps its journal). The default
pipeline runs twice, in a copy of the repository, to compare bytes. (For the large model: `python src/preset.py h100`, then
src/train.py, sample.py and evaluate.py. A training that is stopped goes on when it is started again.)
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contenders import NULL_CLASS, PEERS, ROOT, SHAPE, Contender, Ours
from ddpm import training
from ddpm.data import RAW, load_split, to_model_range
from ddpm.device import select_device
from ddpm.files import file_sha256
from ddpm.params import clean_errors, load_params
from measure import gemm_rate, gflop, machine, seconds, table

BATCH, STEPS = 512, 300
MATRIX = 8192  # the side of the matrices that measure the rate
aten = torch.ops.aten
DENSE = {aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm}


def main() -> None:
    device = select_device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    data = training.Data(*(x.to(device) for split in ("train", "test") for x in load_split(ROOT / RAW, split)))
    rows: list[list[str]] = []

    def add(name: str, value: str) -> None:
        rows.append([name, value])
        print(f"{name}: {value}", flush=True)

    add("machine", machine()["processor"])
    matrix, memory = gemm_rate(device, torch.bfloat16, MATRIX), memory_rate(device)
    add("bf16 matrix rate", f"{matrix / 1000:.1f} TFLOP/s")
    add("memory rate", f"{memory:.0f} GB/s")
    training_rates(device, data, matrix, memory, add)
    default_run(add)
    print(table(["", f"bf16, batch {BATCH} where none is said"], rows))


def memory_rate(device: torch.device) -> float:
    """GB/s of a copy on the device, read and written bytes together."""
    x = torch.empty(2**28, device=device)
    return 2 * 4 * 2**28 / min(seconds(x.clone, device, 5) for _ in range(3)) / 1e9


def training_rates(device: torch.device, data: training.Data, matrix: float, memory: float, add: Callable) -> None:
    """This project's own loop, each peer's own, and each peer's model compiled, channels_last, on data in device memory."""
    ours = own_rate(device, data)
    add("this project: training", f"{ours:,.0f} images/s")
    work, traffic = cost_of_an_image(device)
    bound = max(work / matrix, traffic / memory)
    by = "matrix" if work / matrix > traffic / memory else "memory"
    add(f"this project: share of the {by} rate, which bounds it", f"{ours * bound:.0%}")
    for peer in PEERS:
        for loop, helped in (("its own loop", False), ("compiled, our data path", True)):
            try:
                rate = peer_rate(peer(), device, data, helped)
            except ImportError:
                add(peer.name, "not installed here")
                break
            except Exception as error:  # what a compiler makes of somebody else's model
                add(f"{peer.name}: {loop}", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")
                continue
            add(f"{peer.name}: {loop}", f"{rate:,.0f} images/s; this project's are {ours / rate:.2f} times as many")


def own_rate(device: torch.device, data: training.Data) -> float:
    """Images/s as `training.train` itself reports them, the median of its windows once it is warm."""
    settings = {"batch_size": BATCH, "steps": STEPS, "report_every": STEPS, "precision": "bfloat16"}
    p = load_params(ROOT / "params.yaml").train.model_copy(update=settings)

    class Rates(list):
        def metrics(self, _step: int, values: dict[str, float]) -> None:
            self.extend(v for name, v in values.items() if name == "train/images_per_second")

        def preview(self, step: int, images: Tensor) -> None: ...

    with tempfile.TemporaryDirectory() as folder:
        training.train(p, data, device, Path(folder), rates := Rates(), compile_model=device.type == "cuda")
    return statistics.median(rates[len(rates) // 3 :])


def peer_rate(peer: Contender, device: torch.device, data: training.Data, helped: bool) -> float:
    """Images/s of its steps; its own loop takes its batches from the host's memory."""
    if helped:
        peer.model.to(memory_format=torch.channels_last)
    peer.start(device, bfloat16=True)
    if helped:
        peer.model.compile(mode="reduce-overhead")
    images, labels = (data.images, data.labels) if helped else (data.images.cpu(), data.labels.cpu())

    def step() -> None:
        batch = torch.randint(len(images), (BATCH,), device=images.device)
        peer.step(to_model_range(images[batch]).to(device), labels[batch].to(device))

    reproducible = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # a promise that only this project makes, at a price
    try:
        seconds(step, device, STEPS // 10)  # warm-up
        return BATCH / statistics.median(seconds(step, device, STEPS // 10) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(reproducible, warn_only=True)


def cost_of_an_image(device: torch.device) -> tuple[float, float]:
    """GFLOP and GB of memory traffic that training this project's model on an image takes at least, in bf16.

    The traffic is what matrix products and convolutions read and write, as if all else were fused into them.
    """
    ours, n = Ours(), 64
    ours.start(device, bfloat16=True)
    images, labels = torch.rand(n, *SHAPE, device=device) * 2 - 1, torch.randint(NULL_CLASS, (n,), device=device)

    def work() -> None:
        with ours.autocast:
            loss = ours.loss(images, labels)
        loss.backward()

    with Traffic() as traffic:
        work()
    return gflop(work) / n, traffic.bytes / n / 1e9


class Traffic(TorchDispatchMode):
    """Counts the bytes of what dense operations take and give."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in DENSE:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def default_run(add: Callable) -> None:
    """The default parameters from the first step to the finished grid, in a copy of the repository, twice."""
    outputs = ("models/diffusion_model.pth", "output/samples.npz", "output/metrics/evaluate.json")
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for name in ("src", "data", "models", "params.yaml"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, here / name)
        for run in ("first", "second"):
            times = []
            for stage in ("train", "sample", "evaluate"):
                began = time.monotonic()
                done = subprocess.run([sys.executable, f"src/{stage}.py"], cwd=here, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{stage}: {done.stderr[-2000:]}")
                times.append(time.monotonic() - began)
            digests.append([file_sha256(here / path) for path in outputs])
            spent = ", ".join(
                f"{stage} {t:.1f} s" for stage, t in zip(("training", "sampling", "evaluation"), times, strict=True)
            )
            add(f"default parameters, {run} run", f"{spent}, with imports and compilation")
        metrics = json.loads((here / outputs[-1]).read_text())
    add("default parameters: fid", f"{metrics['fid']:.4f}, {metrics['fid'] / metrics['fid_floor']:.1f} times the floor")
    add("default parameters: the same bytes in both runs", "yes" if digests[0] == digests[1] else "no")


if __name__ == "__main__":
    with clean_errors():
        main()
