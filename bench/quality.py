"""Time to quality: everyone trains from scratch, in turns of a minute, and is judged along the way."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from contenders import PEERS, ROOT, Contender, Ours
from ddpm.data.fashion_mnist import load_split
from ddpm.data.pixels import to_model_range
from ddpm.runtime.run_folder import fingerprint
from ddpm.training.state import load_state, save_state
from measure import GARBAGE, judge, machine, table

BATCH, EVALUATIONS = 64, 20
TURN = 60  # seconds
OWN_MINUTES, PEER_MINUTES = (1, 2, 5, 10, 20), (5, 10, 20)  # after which they are judged


def run(full: bool) -> dict:
    """`full`: three hours. Interrupted and started again on the same machine, it goes on with the turn it was in."""
    device = torch.device("cpu")
    own_minutes, peer_minutes, count = (OWN_MINUTES, PEER_MINUTES, 2000) if full else ((1,), (1,), 300)
    images, labels = load_split(ROOT / "data/FashionMNIST/raw", "train")
    fid = judge(images)
    contenders: list[Contender] = [Ours(), Ours(conditional=False), *(peer() for peer in PEERS)]
    on = machine()
    settings = {"full": full, "processor": on["processor"], **on["versions"]}
    of = fingerprint(settings, [*code_files(), ROOT / "params.yaml"])
    states = ROOT / f".cache/quality-{of}"
    turns = {}
    for c in contenders:
        c.start(device)
        turns[c.name] = {"minute": 0, "fid": {}, "seconds": 0.0} | resumed(c, states / c.name)
    try:
        for minute in range(1, max(own_minutes) + 1):
            for c in contenders:
                turn = turns[c.name]
                if turn["minute"] >= minute:
                    continue
                torch.manual_seed(minute)  # whether or not it was interrupted before
                began = time.perf_counter()
                train(c, images, labels, TURN)
                if minute in (own_minutes if isinstance(c, Ours) else peer_minutes):
                    value = turn["fid"][str(minute)] = judged(c, count, fid)
                    print(f"{c.name}, {minute} min, {c.steps} steps: fid {shown(value)}", flush=True)
                turn |= {"minute": minute, "seconds": turn["seconds"] + time.perf_counter() - began}
                save(c, turn, states / c.name)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    shutil.rmtree(states, ignore_errors=True)
    rows = {c.name: {"fid": turns[c.name]["fid"], "images_seen": c.steps * BATCH, "classes": c.conditional} for c in contenders}
    minutes = round(sum(turn["seconds"] for turn in turns.values()) / 60, 1)
    return {"samples": count, "evaluations": EVALUATIONS, "batch": BATCH, "rows": rows, "minutes": minutes}


def code_files() -> list[Path]:
    """The code that decides the result: this comparison, the contenders, and all of the library."""
    here = Path(__file__).parent
    return [here / f"{name}.py" for name in ("quality", "contenders", "measure")] + sorted((ROOT / "src/ddpm").rglob("*.py"))


def save(c: Contender, turn: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"turn": turn, "steps": c.steps, "model": c.model.state_dict(), "ema": c.ema.state_dict()}
    save_state(folder, turn["minute"], content | {"optimizers": [optimizer.state_dict() for optimizer in c.optimizers]})


def resumed(c: Contender, folder: Path) -> dict:
    """Its last turn, whose state it is given, if there is one."""
    state = load_state(folder)
    if state is None:
        return {}
    c.model.load_state_dict(state["model"])
    c.ema.load_state_dict(state["ema"])
    for optimizer, content in zip(c.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(content)
    c.steps = state["steps"]
    return state["turn"]


def train(c: Contender, images: torch.Tensor, labels: torch.Tensor, seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        step(c, images, labels)


def step(c: Contender, images: torch.Tensor, labels: torch.Tensor) -> None:
    batch = torch.randint(len(images), (BATCH,))
    c.step(to_model_range(images[batch]).to(c.device), labels[batch].to(c.device))


def judged(c: Contender, count: int, fid: Callable[[torch.Tensor], float]) -> float | None:
    """The FID of its samples; None, and a line that says why, where the guard finds them to be garbage."""
    try:
        return fid(c.draw(count, EVALUATIONS))
    except SystemExit as garbage:
        print(garbage, flush=True)
        return None


def shown(value: float | None) -> str:
    return GARBAGE if value is None else f"{value:.3f}"


def report(result: dict) -> str:
    minutes = sorted({int(m) for r in result["rows"].values() for m in r["fid"]})
    header = ["", *(f"{m} min" for m in minutes), "images seen"]
    rows = [
        [name, *(shown(r["fid"][str(m)]) if str(m) in r["fid"] else "" for m in minutes), f"{r['images_seen']:,}"]
        for name, r in result["rows"].items()
    ]
    note = f"`fid` of {result['samples']} samples, {result['evaluations']} network evaluations each: half as many steps with "
    note += "guidance, or as many without, where there are no classes. The learning rate stays constant after its warm-up."
    if any(value is None for r in result["rows"].values() for value in r["fid"].values()):
        note += " Garbage: more than a twentieth of them were blank, or not numbers."
    return table(header, rows) + "\n\n" + note


def plot(result: dict, axes) -> None:
    for name, r in result["rows"].items():
        known = {int(m): value for m, value in r["fid"].items() if value is not None}
        axes.loglog(known.keys(), known.values(), marker="o", label=name)
    axes.set_xlabel("minutes of training on two cores")
    axes.set_ylabel(f"FID, {result['samples']} samples")
    axes.set_title("Quality against training time")
    axes.set_xticks(minutes := [1, 2, 5, 10, 20], [str(m) for m in minutes])
    axes.legend(loc="lower left", fontsize="small")
