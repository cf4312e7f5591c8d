"""What publish.py made: a row a preset, and its training curve."""

from measure import table

NAMES = ("kid", "c2st_auc", "precision", "recall", "class_accuracy", "nearest_neighbour_ratio")


def table_of_metrics(cards: dict[str, dict]) -> str:
    names = [name for name in NAMES if any(name in card["metrics"] for card in cards.values())]  # older cards lack c2st_auc
    header = ["", "FID", "× floor", *(f"`{name}`" for name in names), "parameters", "training"]
    rows = []
    for preset, card in cards.items():
        m = card["metrics"]
        rows.append([
            f"{preset}, n = {card['samples']:,}",
            f"{m['fid']:.4f}",
            f"{m['fid'] / m['fid_floor']:.1f}",
            *(f"{m[name]:.4g}" if name in m else "" for name in names),
            f"{card['parameters'] / 1e6:.1f} M",
            f"{card['seconds']['train']:,.0f} s",
        ])  # fmt: skip
    return f"{table(header, rows)}\n\nMultiples compare at the same n only: more samples lower the floor more than the FID."


def report(result: dict) -> str:
    made = [f"{preset}: {c['device']}, PyTorch {c['versions']['torch']}, {c['date']}" for preset, c in result.items()]
    how = "Made by `python release/publish.py make OUT`, with `--preset` where it is named."
    return f"{table_of_metrics(result)}\n\n{how} {'; '.join(made)}."


def plot(result: dict, axes) -> None:
    for preset, card in result.items():
        for split, style in (("train", "-"), ("validation", "o")):
            steps, losses = zip(*card["curves"][split], strict=True)
            axes.loglog(steps, losses, style, linewidth=1, label=f"{preset}, {split}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title("Training curve")
    axes.legend()
