"""Images a second in training: forward, backward, optimiser and average, each contender's own way of doing it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from contenders import NULL_CLASS, PEERS, SHAPE, Contender, Diffusers, Ours
from ddpm.training import make_optimizers
from measure import alternating, gemm_rate, gflop, table
from twin import Twin

BATCH = 64
GROUPS, HEADS = 8, 4  # this project's own
KERNELS = ("convolution", "scaled_dot_product")  # parts of the names of those that the peer and its twin share


class OursAsDiffusers(Ours):
    """The peer's architecture out of this project's blocks, trained by this project's loop with the peer's optimiser."""

    def __init__(self, name: str, model: Twin):
        super().__init__()
        self.name, self.model = f"diffusers' UNet2DModel rebuilt from this project's blocks{name}", model
        self.model.to(memory_format=torch.channels_last)
        self.optimizers = make_optimizers(self.p.model_copy(update={"optimizer": "adamw"}), model)


def run(full: bool) -> dict:
    device = torch.device("cpu")
    twins = [OursAsDiffusers("", Twin()), OursAsDiffusers(", with its groups and heads", Twin(groups=GROUPS, heads=HEADS))]
    contenders: list[Contender] = [Ours(), *(peer() for peer in PEERS), *twins]
    images, labels = torch.rand(BATCH, *SHAPE) * 2 - 1, torch.randint(NULL_CLASS, (BATCH,))
    rows = {}
    for c in contenders:
        c.start(device)
        work = gflop(lambda c=c: c.loss(images, labels).backward()) / BATCH
        rows[c.name] = {"parameters": sum(w.numel() for w in c.model.parameters()), "gflop_an_image": work}
    taken = alternating(
        {c.name: lambda c=c: c.step(images, labels) for c in contenders}, device, repeats=9 if full else 3, times=4 if full else 2
    )
    gemm = gemm_rate(device)
    for name, row in rows.items():
        row["images_a_second"] = BATCH / taken[name]
        row["share_of_gemm"] = row["images_a_second"] * row["gflop_an_image"] / gemm
    peer = next(c for c in contenders if c.name == Diffusers.name)
    return {
        "batch": BATCH,
        "gemm": gemm,
        "rows": rows,
        "twins": [twin.name for twin in twins],
        "peer": peer.name,
        "kernel_share": kernel_share(lambda: peer.step(images, labels)),
    }


def kernel_share(work: Callable[[], object]) -> float:
    """The share of the processor's time that KERNELS take, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    events = profiler.key_averages()
    shared = sum(e.self_cpu_time_total for e in events if any(kernel in e.key for kernel in KERNELS))
    return shared / sum(e.self_cpu_time_total for e in events)


def report(result: dict) -> str:
    header = ["", "images/s", "GFLOP an image", "share of GEMM rate", "parameters"]
    rows = [
        [
            name,
            f"{r['images_a_second']:.0f}",
            f"{r['gflop_an_image']:.2f}",
            f"{r['share_of_gemm']:.0%}",
            f"{r['parameters'] / 1e6:.2f} M",
        ]
        for name, r in result["rows"].items()
    ]
    peer, *twins = (result["rows"][name] for name in (result["peer"], *result["twins"]))
    same, own = (twin["images_a_second"] / peer["images_a_second"] for twin in twins)
    work = twins[0]["gflop_an_image"] / peer["gflop_an_image"]
    return table(header, rows) + (
        f"\n\nThe rebuilt UNet2DModel does {work:.3f} times the GFLOP of diffusers' own. With 32 groups and heads of 8 channels, "
        f"like that, it trains {same:.2f} times as many images a second, with {GROUPS} groups and {HEADS} heads {own:.2f} times. "
        f"{result['kernel_share']:.0%} of diffusers' step is spent in PyTorch's kernels for convolution and attention, which the "
        f"rebuilt one calls alike. GEMM rate: {result['gemm']:.0f} GFLOP/s."
    )
