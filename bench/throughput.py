"""Images a second in training: forward, backward, optimiser and average, each contender's own way of doing it."""

import torch

from contenders import NULL_CLASS, PEERS, SHAPE, Contender, Diffusers, Ours
from ddpm.training import make_optimizers
from measure import alternating, gemm_rate, gflop, table
from twin import Twin

BATCH = 64


class OursAsDiffusers(Ours):
    """The peer's architecture out of this project's blocks, trained by this project's loop."""

    def __init__(self):
        super().__init__()
        self.name = "diffusers' UNet2DModel rebuilt from this project's blocks"
        self.model = Twin().to(memory_format=torch.channels_last)
        self.optimizers = make_optimizers(self.p, self.model)


def run(full: bool) -> dict:
    device = torch.device("cpu")
    contenders: list[Contender] = [Ours(), *(peer() for peer in PEERS), OursAsDiffusers()]
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
    twin, peer = rows[contenders[-1].name], rows[Diffusers.name]
    return {
        "batch": BATCH,
        "gemm": gemm,
        "rows": rows,
        "twin_over_diffusers": twin["images_a_second"] / peer["images_a_second"],
        "twin_gflop_over_diffusers": twin["gflop_an_image"] / peer["gflop_an_image"],
    }


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
    return (
        table(header, rows)
        + f"\n\nThe rebuilt UNet2DModel does {result['twin_gflop_over_diffusers']:.3f} times the GFLOP of diffusers' own at "
        f"{result['twin_over_diffusers']:.2f} times its images a second. GEMM rate: {result['gemm']:.0f} GFLOP/s."
    )
