"""`python bench/gpu.py`: all that docs/RESULTS.md says of a GPU, in one command of some five minutes; its table comes last.

Needs neither DVC nor MLflow (a training keeps its journal), and data/FashionMNIST/raw or runtime.data_folder. Peers that
aren't installed are left out, and named. The default pipeline runs in a copy of the repository, twice, to compare bytes.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from contenders import NULL_CLASS, PEERS, ROOT, SHAPE, Contender, Ours
from ddpm.device import select_device
from ddpm.files import file_sha256
from measure import alternating, gemm_rate, gflop, machine, seconds, table

BATCH, REPEATS, STEPS = 512, 5, 30


def main() -> None:
    device = select_device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    rows = [["machine", machine()["processor"]]]
    bf16, memory = gemm_rate(device, torch.bfloat16, 8192), memory_rate(device)
    rows += [["bf16 matrix rate", f"{bf16 / 1000:.0f} TFLOP/s"], ["memory rate", f"{memory:.0f} GB/s"]]
    rows += training_rates(device, bf16)
    rows += default_run()
    print(table(["GPU", ""], rows))


def memory_rate(device: torch.device) -> float:
    """GB/s of a copy on the device, read and written bytes together."""
    x = torch.empty(2**28, device=device)
    return 2 * 4 * 2**28 / min(seconds(x.clone, device, 5) for _ in range(3)) / 1e9


def training_rates(device: torch.device, bf16: float) -> list[list[str]]:
    """Images/s with bf16: ours, each peer's own loop, and each peer's model compiled, channels_last and on data in memory."""
    images, labels = torch.rand(BATCH, *SHAPE, device=device) * 2 - 1, torch.randint(NULL_CLASS, (BATCH,), device=device)
    host_images, host_labels = images.cpu(), labels.cpu()
    works, notes = {}, []
    work_an_image = {}

    def add(name: str, contender: Contender, compiled: bool, on_device: bool) -> None:
        contender.start(device)
        work_an_image[name] = gflop(lambda: contender.loss(images[:8], labels[:8]).backward()) / 8
        if compiled:
            contender.model = contender.model.to(memory_format=torch.channels_last)
            contender.model.compile(mode="reduce-overhead")

        def step() -> None:
            x, y = (images, labels) if on_device else (host_images.to(device), host_labels.to(device))
            with torch.autocast(device.type, torch.bfloat16):
                contender.step(x, y)

        works[name] = step

    add("this project", Ours(), True, True)
    for peer in PEERS:
        try:
            add(f"{peer.name}, its own loop", peer(), False, False)
            add(f"{peer.name}, our loop", peer(), True, True)
        except ImportError:
            notes.append([peer.name, "not installed here"])
    taken = {}
    for name, work in list(works.items()):
        try:
            work()
        except Exception as error:  # what a compiler makes of somebody else's model
            notes.append([name, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"])
            del works[name]
    taken = alternating(works, device, REPEATS, STEPS)
    ours = taken["this project"]
    rates = [
        [f"{name}: training, batch {BATCH}", f"{BATCH / s:,.0f} images/s" + (f" (ours: {s / ours:.2f} ×)" if s != ours else "")]
        for name, s in taken.items()
    ]
    share = BATCH / ours * work_an_image["this project"] / bf16
    return [*rates, ["this project's share of the bf16 matrix rate", f"{share:.1%}"], *notes]


def default_run() -> list[list[str]]:
    """The default parameters from the first step to the finished grid, in a copy of the repository, twice."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for name in ("src", "data", "models", "params.yaml"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, here / name)
        digests, rows = [], []
        for run in ("first", "second"):
            times = []
            for stage in ("train", "sample"):
                began = time.monotonic()
                done = subprocess.run([sys.executable, f"src/{stage}.py"], cwd=here, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{stage}: {done.stderr[-2000:]}")
                times.append(time.monotonic() - began)
            digests.append([file_sha256(here / path) for path in ("models/diffusion_model.pth", "output/samples.npz")])
            rows.append([f"default parameters, {run} run", f"training {times[0]:.1f} s, sampling {times[1]:.1f} s"])
        rows.append(["the same bytes in both runs", "yes" if digests[0] == digests[1] else "no"])
    return rows


if __name__ == "__main__":
    main()
