"""Train an evaluator of the data set in params.yaml into a file of its own: `python src/train_classifier.py`.

Figures are comparable only if they come from the same frozen features. Fashion-MNIST's evaluator was made with this command, and
is in git. For other data `evaluate` trains one and keeps it in .cache; a file made here can be committed, or copied to other
machines. Prints the card of the classifier, which says how good it is, and writes it beside the weights.
"""

import argparse
import json
import sys
from pathlib import Path

from ddpm.data.dataset import load_dataset
from ddpm.evaluation.classifier_training import make_classifier, write_classifier
from ddpm.evaluation.judge import REFERENCES
from ddpm.params import FASHION_MNIST
from ddpm.params_file import load_params
from ddpm.paths import CLASSIFIER, classifier_file
from ddpm.runtime.cli import clean_errors
from ddpm.runtime.device import select_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"{CLASSIFIER}, or models/classifier-NAME.pth for other data")
    out, params = parser.parse_args().out, load_params()
    data_name = params.data.name
    out = out or (CLASSIFIER if data_name == FASHION_MNIST else classifier_file(data_name))
    device = select_device(params.runtime.device, tf32=False, deterministic=params.runtime.deterministic)
    content, card = make_classifier(load_dataset(data_name).subsample(REFERENCES), data_name, device)
    print(json.dumps(card, indent=2))
    write_classifier(out, content, card)
    done = f"{out} and {out.with_suffix('.json')} are ready; name the first in params.yaml as evaluate.classifier"
    print(done, file=sys.stderr)  # standard output is the card alone


if __name__ == "__main__":
    with clean_errors():
        main()
