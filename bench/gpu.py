"""`python bench/gpu.py [part …]`: what a GPU makes of this project and its peers, in one command.

Its table comes last, and its figures are in bench/results/gpu.json, part by part, so that what a limit of time cut off can be
asked for by name: rates, default, peers, small, helped, fast. It needs data/FashionMNIST/raw, and of requirements.txt neither
DVC nor MLflow (a training keeps its journal). The default pipeline runs twice, in copies of the repository, to compare bytes.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contenders import NULL_CLASS, PEERS, ROOT, SHAPE, Contender, Ours
from ddpm.data.dataset import Dataset
from ddpm.data.fashion_mnist import load_split
from ddpm.data.pixels import to_model_range
from ddpm.errors import UserError
from ddpm.files import file_sha256
from ddpm.params import FASHION_MNIST
from ddpm.params_file import load_params
from ddpm.paths import raw_folder
from ddpm.runtime.cli import clean_errors
from ddpm.runtime.device import can_compile, select_device
from ddpm.training import loop, step
from measure import Rates, gemm_rate, gflop, keep, kept, machine, own_environment, seconds, table

BATCH, STEPS = 512, 300
MATRIX = 8192  # the side of the matrices that measure the rate
STAGES = ("train", "sample", "evaluate")
aten = torch.ops.aten
DENSE = {aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm}

Figures = Iterator[tuple[str, float | str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help=f"all by default: {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = select_device(options.device)
    data = Dataset(*(x.to(device) for split in ("train", "test") for x in load_split(ROOT / raw_folder(FASHION_MNIST), split)))
    result = kept("gpu") or {}
    for name in options.parts or PARTS:
        torch.compiler.reset()  # or its kernels are for any batch size, once it has seen two: slow, and one crashed
        figures = {}
        result[name] = {"on": machine(), "figures": figures}
        try:
            for figure, value in PARTS[name](device, data):
                figures[figure] = value
                print(f"{name}: {figure}: {value}", flush=True)
                keep("gpu", result)
        except (ImportError, UserError) as error:  # a peer that isn't there, a stage that fails: the other parts still count
            print(f"{name}: {error}", flush=True)
    print(report(result))


def rates(device: torch.device, data: Dataset) -> Figures:
    """What the device can do, and how much of that this project's training takes, with fused kernels as a long one has."""
    yield "matrix products, TFLOP/s", gemm_rate(device, torch.bfloat16, MATRIX) / 1000
    yield "memory, GB/s", memory_rate(device)
    yield "images/s", own_rate(device, data)
    work, traffic = cost_of_an_image(device)
    yield "GFLOP an image", work
    yield "MB an image", 1000 * traffic


def small(device: torch.device, data: Dataset) -> Figures:
    """The default's own batches, whose kernels are so small that launching them is what counts."""
    batch = load_params(ROOT / "params.yaml").train.batch_size
    yield "CUDA graphs", own_rate(device, data, batch, fused=False)
    yield "fused", own_rate(device, data, batch)
    yield "eager", own_rate(device, data, batch, compile_model=False)


def fast(device: torch.device, data: Dataset) -> Figures:
    """With `runtime.deterministic: false`."""
    with fastest_kernels(device):
        yield "images/s", own_rate(device, data)


def peers(device: torch.device, data: Dataset) -> Figures:
    """As they come: eager, on batches from the host."""
    for peer in PEERS:
        yield peer.name, peer_rate(peer(), device, data, helped=False)


def helped(device: torch.device, data: Dataset) -> Figures:
    """As this project's own model is: compiled, channels_last, the data on the device."""
    for peer in PEERS:
        try:
            yield peer.name, peer_rate(peer(), device, data, helped=True)
        except Exception as error:  # what a compiler makes of somebody else's model
            yield peer.name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def memory_rate(device: torch.device) -> float:
    """GB/s of a copy on the device, read and written bytes together."""
    x = torch.empty(2**28, device=device)
    return 2 * 4 * 2**28 / min(seconds(x.clone, device, 5) for _ in range(3)) / 1e9


def own_rate(device: torch.device, data: Dataset, batch: int = BATCH, fused: bool = True, compile_model: bool = True) -> float:
    """Images/s as the training loop itself reports them, the median of its windows once it is warm."""
    settings = {"batch_size": batch, "steps": STEPS, "report_every": STEPS, "precision": "bfloat16"}
    p = load_params(ROOT / "params.yaml").train.model_copy(update=settings)
    worth, step.WORTH_FUSING = step.WORTH_FUSING, 0 if fused else math.inf
    try:
        with tempfile.TemporaryDirectory() as folder:
            execution = step.Execution(device, compile_model and can_compile(device))
            loop.train(p, data, Path(folder), log := Rates(), execution)
    finally:
        step.WORTH_FUSING = worth
    return statistics.median(log[len(log) // 3 :])


def peer_rate(peer: Contender, device: torch.device, data: Dataset, helped: bool) -> float:
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

    with fastest_kernels(device):
        seconds(step, device, STEPS // 10)  # warm-up
        return BATCH / statistics.median(seconds(step, device, STEPS // 10) for _ in range(5))


@contextmanager
def fastest_kernels(device: torch.device) -> Iterator[None]:
    """Without the promise of the same bytes, which only this project makes, at a price."""
    select_device(str(device), deterministic=False)
    try:
        yield
    finally:
        select_device(str(device))


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


def default(device: torch.device, _data: Dataset) -> Figures:
    """The default parameters from the first step to the finished grid and its metrics, twice from nothing."""
    outputs = ("models/diffusion_model.pth", "output/samples.npz", "output/metrics/evaluate.json")
    environment = own_environment()
    digests = []
    for run in ("first", "second"):
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            for name in ("src", "data", "models"):
                shutil.copytree(ROOT / name, here / name)
            params = yaml.safe_load((ROOT / "params.yaml").read_text())
            params["runtime"] |= {"device": str(device)}
            (here / "params.yaml").write_text(yaml.safe_dump(params))
            environment |= {"TORCHINDUCTOR_CACHE_DIR": str(here / "inductor"), "TRITON_CACHE_DIR": str(here / "triton")}
            for stage in STAGES:
                began, command = time.monotonic(), [sys.executable, f"src/{stage}.py"]
                done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise UserError(f"{run} default run: {stage} failed: {(done.stderr.splitlines() or [''])[-1]}")
                yield f"{run} run: {stage}, s", time.monotonic() - began
            digests.append([file_sha256(here / path) for path in outputs])
            metrics = json.loads((here / outputs[-1]).read_text())
            yield from ((name, metrics[name]) for name in ("fid", "fid_floor"))
    yield "the same bytes", "yes" if digests[0] == digests[1] else "no"


PARTS = {"rates": rates, "default": default, "peers": peers, "small": small, "helped": helped, "fast": fast}
HELP = {"peers": "eager, data on the host", "helped": "compiled, channels_last, data on the device"}


def report(result: dict) -> str:
    """Tables of the parts that were measured, as far as they were."""
    known = {name: result[name]["figures"] for name in PARTS if name in result}
    r, tables = known.get("rates", {}), []
    if "images/s" in r:
        own = {"this project": r["images/s"]}
        if known.get("fast"):
            own["this project, `runtime.deterministic: false`"] = known["fast"]["images/s"]
        header = ["this project is faster by a factor of", "by, with `deterministic: false`"][: len(own)]
        rows = [[name, f"{value:,.0f}", *[""] * len(own)] for name, value in own.items()]
        for part, how in HELP.items():
            for name, value in known.get(part, {}).items():
                failed = isinstance(value, str)
                factors = ["" if failed else f"{x / value:.1f}" for x in own.values()]
                rows.append([f"{name}: {how}", value if failed else f"{value:,.0f}", *factors])
        tables.append(table([f"training in bf16, batch {BATCH}", "images/s", *header], rows))
    if "MB an image" in r:
        shares = []
        for what, unit, cost in (("matrix products", "TFLOP/s", "GFLOP an image"), ("memory", "GB/s", "MB an image")):
            peak = r[f"{what}, {unit}"]
            shares.append([what, f"{peak:,.0f} {unit}", f"{r['images/s'] * r[cost] / 1000 / peak:.1%}"])
        tables.append(table(["", "measured here", "this project's training takes"], shares))
    if s := known.get("small"):
        header = ["the default's batches", "images/s"]
        tables.append(table(header, [[how, f"{value:,.0f}"] for how, value in s.items()]))
    if d := known.get("default"):
        rows = []
        for run in ("first", "second"):
            spent = [d.get(f"{run} run: {stage}, s") for stage in STAGES]
            if any(spent):
                rows.append([f"{run} run", *("" if s is None else f"{s:.1f} s" for s in spent)])
        tables.append(table(["default parameters, from nothing", *STAGES], rows))
        if "fid_floor" in d:
            tables.append(f"`fid` {d['fid']:.4f}, {d['fid'] / d['fid_floor']:.1f} times the floor.")
        if "the same bytes" in d:
            tables.append(f"The same bytes in both runs: {d['the same bytes']}.")
    made = defaultdict(list)
    for name in known:
        on = result[name]["on"]
        versions = f"Python {on['python']}, PyTorch {on['versions']['torch']}"
        made[f"{on['date']}, commit {on['commit']}; {on['processor']}; {versions}"].append(name)
    sources = "; ".join(f"{', '.join(names)}: {where}" for where, names in made.items())
    return "\n\n".join([*tables, f"<sub>`python bench/gpu.py`, {sources}.</sub>"])


if __name__ == "__main__":
    with clean_errors():
        main()
