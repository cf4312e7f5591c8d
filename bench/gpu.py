"""`python bench/gpu.py`: what a GPU makes of this project and its peers, in one command.

Its table comes last. It needs data/FashionMNIST/raw, and of requirements.txt neither DVC nor MLflow (a training keeps its
journal). The default pipeline runs twice, in copies of the repository, to compare bytes. (For the large model: `python
src/preset.py h100`, then src/train.py, sample.py and evaluate.py. A training that is stopped goes on when started again.)
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contenders import NULL_CLASS, PEERS, ROOT, SHAPE, Contender, Ours
from ddpm import training
from ddpm.data import RAW, load_split, to_model_range
from ddpm.device import can_compile, select_device
from ddpm.files import file_sha256
from ddpm.params import clean_errors, load_params
from measure import Rates, gemm_rate, gflop, seconds, table

BATCH, STEPS = 512, 300
MATRIX = 8192  # the side of the matrices that measure the rate
aten = torch.ops.aten
DENSE = {aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    device = select_device(name)
    data = training.Data(*(x.to(device) for split in ("train", "test") for x in load_split(ROOT / RAW, split)))
    rows: list[list[str]] = []

    def add(what: str, value: str) -> None:
        rows.append([what, value])
        print(f"{what}: {value}", flush=True)

    matrix, memory = gemm_rate(device, torch.bfloat16, MATRIX), memory_rate(device)
    add("bf16 matrix rate", f"{matrix / 1000:.1f} TFLOP/s")
    add("memory rate", f"{memory:.0f} GB/s")
    training_rates(device, data, matrix, memory, add)
    default_run(name, add)
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    print(table([f"{model}, PyTorch {torch.__version__}", f"training in bf16, batch {BATCH}"], rows))


def memory_rate(device: torch.device) -> float:
    """GB/s of a copy on the device, read and written bytes together."""
    x = torch.empty(2**28, device=device)
    return 2 * 4 * 2**28 / min(seconds(x.clone, device, 5) for _ in range(3)) / 1e9


def training_rates(device: torch.device, data: training.Data, matrix: float, memory: float, add: Callable) -> None:
    """This project's own loop beside each peer's model, eager on batches from the host, and helped as this project's is."""
    ours = own_rate(device, data)
    add("this project: training", f"{ours:,.0f} images/s")
    select_device(str(device), deterministic=False)
    faster = own_rate(device, data)
    select_device(str(device))
    add("this project: training with runtime.deterministic: false", f"{faster:,.0f} images/s, {faster / ours:.2f} times as many")
    work, traffic = cost_of_an_image(device)
    add("this project: share of the matrix rate", f"{ours * work / matrix:.1%}, of {work:.3f} GFLOP an image")
    add(
        "this project: share of the memory rate",
        f"{ours * traffic / memory:.1%}, of {1000 * traffic:.1f} MB an image, were there no caches",
    )
    for peer in PEERS:
        for how, helped in (("eager, data on the host", False), ("compiled, channels_last, data on the device", True)):
            try:
                rate = peer_rate(peer(), device, data, helped)
            except ImportError:
                add(peer.name, "not installed here")
                break
            except Exception as error:  # what a compiler makes of somebody else's model
                add(f"{peer.name}: {how}", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")
                continue
            add(f"{peer.name}: {how}", f"{rate:,.0f} images/s; this project's are {ours / rate:.2f} times as many")


def own_rate(device: torch.device, data: training.Data) -> float:
    """Images/s as `training.train` itself reports them, the median of its windows once it is warm."""
    settings = {"batch_size": BATCH, "steps": STEPS, "report_every": STEPS, "precision": "bfloat16"}
    p = load_params(ROOT / "params.yaml").train.model_copy(update=settings)

    with tempfile.TemporaryDirectory() as folder:
        training.train(p, data, device, Path(folder), rates := Rates(), compile_model=can_compile(device))
    return statistics.median(rates[len(rates) // 3 :])


def peer_rate(peer: Contender, device: torch.device, data: training.Data, helped: bool) -> float:
    """Images/s of its steps; `helped`: as this project's own, compiled, channels_last, and with the data on the device."""
    if helped:
        peer.model.to(memory_format=torch.channels_last)
    peer.start(device, bfloat16=True)
    if helped and can_compile(device):
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
        torch.use_deterministic_algorithms(reproducible)


def cost_of_an_image(device: torch.device) -> tuple[float, float]:
    """GFLOP and GB of memory traffic that training this project's model on an image takes at least, in bf16.

    The traffic is what matrix products and convolutions read and write, as if all else were fused into them.
    """
    ours, n = Ours(), BATCH
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


def default_run(device: str, add: Callable) -> None:
    """The default parameters from the first step to the finished grid, in a copy of the repository, twice from nothing."""
    outputs = ("models/diffusion_model.pth", "output/samples.npz", "output/metrics/evaluate.json")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    digests = []
    for run in ("first", "second"):
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            for name in ("src", "data", "models"):
                shutil.copytree(ROOT / name, here / name)
            params = yaml.safe_load((ROOT / "params.yaml").read_text())
            params["runtime"] |= {"device": device}
            (here / "params.yaml").write_text(yaml.safe_dump(params))
            environment |= {"TORCHINDUCTOR_CACHE_DIR": str(here / "inductor"), "TRITON_CACHE_DIR": str(here / "triton")}
            spent = []
            for stage in ("train", "sample", "evaluate"):
                began, command = time.monotonic(), [sys.executable, f"src/{stage}.py"]
                done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    add(f"default parameters, {run} run", f"{stage} failed: {(done.stderr.splitlines() or [''])[-1]}")
                    return
                spent.append(f"{stage} {time.monotonic() - began:.1f} s")
            add(f"default parameters, {run} run", f"{', '.join(spent)}, with imports and compilation")
            digests.append([file_sha256(here / path) for path in outputs])
            metrics = json.loads((here / outputs[-1]).read_text())
    add("default parameters: fid", f"{metrics['fid']:.4f}, {metrics['fid'] / metrics['fid_floor']:.1f} times the floor")
    add("default parameters: the same bytes in both runs", "yes" if digests[0] == digests[1] else "no")


if __name__ == "__main__":
    with clean_errors():
        main()
