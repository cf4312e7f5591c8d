"""Images a second in training: forward, backward, optimiser and average, each contender's own way of doing it."""

import torch

from contenders import NULL_CLASS, PEERS, ROOT, SHAPE, Contender, Diffusers, Ours
from ddpm.params import TrainParams
from ddpm.params_file import load_params
from ddpm.training.optim import make_optimizers
from measure import alternating, gflop, products, table
from twin import Twin

BATCH = 64
SIDE = 2048  # of the matrices whose product is the measure of the machine


class OursAsDiffusers(Ours):
    """The peer's architecture out of this project's blocks, trained by this project's loop with the peer's kind of optimiser."""

    def __init__(self, p: TrainParams, heads: int | None, said: str):
        super().__init__(p.model_copy(update={"optimizer": "adamw"}))
        self.name = f"diffusers' UNet2DModel rebuilt from this project's blocks, {said}"
        self.model = Twin(heads=heads).to(memory_format=torch.channels_last)
        self.optimizers = make_optimizers(self.p, self.model)


def run(full: bool) -> dict:
    device = torch.device("cpu")
    p = load_params(ROOT / "params.yaml").train
    heads = p.model.heads
    twins = [OursAsDiffusers(p, None, "heads of 8 channels"), OursAsDiffusers(p, heads, f"{heads} heads")]
    contenders: list[Contender] = [Ours(p), *(peer() for peer in PEERS), *twins]
    images, labels = torch.rand(BATCH, *SHAPE) * 2 - 1, torch.randint(NULL_CLASS, (BATCH,))
    rows = {}
    for c in contenders:
        c.start(device)
        work = gflop(lambda c=c: c.loss(images, labels).backward()) / BATCH
        rows[c.name] = {"parameters": sum(w.numel() for w in c.model.parameters()), "gflop_an_image": work}
    works = {c.name: lambda c=c: c.step(images, labels) for c in contenders} | products(device, torch.float32, SIDE)
    taken = alternating(works, device, repeats=9 if full else 3, times=4 if full else 2)
    rate = 2 * SIDE**3 / min(taken[name] for name in works if name not in rows) / 1e9
    for name, row in rows.items():
        row["images_a_second"] = BATCH / taken[name]
        row["share_of_product"] = row["images_a_second"] * row["gflop_an_image"] / rate
    return {"batch": BATCH, "product": rate, "rows": rows, "peer": Diffusers.name, "twins": [twin.name for twin in twins]}


def report(result: dict) -> str:
    header = ["", "images/s", "GFLOP an image", "share of a matrix product's rate", "parameters"]
    rows = [
        [
            name,
            f"{r['images_a_second']:.0f}",
            f"{r['gflop_an_image']:.2f}",
            f"{r['share_of_product']:.0%}",
            f"{r['parameters'] / 1e6:.2f} M",
        ]
        for name, r in result["rows"].items()
    ]
    peer, *twins = (result["rows"][name] for name in (result["peer"], *result["twins"]))
    same, own = (twin["images_a_second"] / peer["images_a_second"] for twin in twins)
    work = twins[0]["gflop_an_image"] / peer["gflop_an_image"]
    return table(header, rows) + (
        f"\n\nThe rebuilt UNet2DModel does {work:.3f} times the GFLOP of diffusers' own. With heads of 8 channels, as there, it "
        f"trains {same:.2f} times as many images a second, with this project's number of heads {own:.2f} times. "
        f"A product of two large matrices runs at {result['product']:.0f} GFLOP/s here."
    )
