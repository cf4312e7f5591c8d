"""Train the evaluator of the data set in params.yaml, once, by hand: `python src/train_classifier.py`.

This is no stage of the pipeline: figures are comparable only if they come from the same frozen features. Prints the card of the
classifier, which says how good it is, and writes it beside the weights.
"""

import argparse
import json
import sys
from pathlib import Path

from ddpm.data.dataset import load_dataset
from ddpm.evaluation.classifier_training import RECIPE, evaluate_classifier, new_classifier, train_classifier
from ddpm.files import sha256, write_atomic
from ddpm.params import FASHION_MNIST
from ddpm.params_file import load_params
from ddpm.paths import CLASSIFIER, classifier_file
from ddpm.runtime.cli import clean_errors
from ddpm.tensor_files import serialise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"{CLASSIFIER}, or models/classifier-NAME.pth for other data")
    out, data_name = parser.parse_args().out, load_params().data.name
    out = out or (CLASSIFIER if data_name == FASHION_MNIST else classifier_file(data_name))
    data = load_dataset(data_name)
    classes = len(data.classes)

    weights = train_classifier(data.images, data.labels, classes).state_dict()
    weights = {name: w.half().contiguous() if w.is_floating_point() else w for name, w in weights.items()}
    model = new_classifier(data.images, classes)
    model.load_state_dict(weights)  # evaluated as it will be used: stored in half precision, computed in float32
    content = serialise({"weights": weights})
    card = {
        "sha256": sha256(content),
        "data": data_name,
        "parameters": sum(p.numel() for p in model.parameters()),
        **evaluate_classifier(model.eval(), data),
        "recipe": RECIPE,
    }
    print(json.dumps(card, indent=2))
    write_atomic(out, content)
    write_atomic(out.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())
    done = f"{out} and {out.with_suffix('.json')} are ready; name the first in params.yaml as evaluate.classifier"
    print(done, file=sys.stderr)  # standard output is the card alone


if __name__ == "__main__":
    with clean_errors():
        main()
