"""Train the evaluator of params.yaml's data set, once, by hand: `python src/train_classifier.py`.

No stage of the pipeline: figures compare only under the same frozen features. Prints, and writes beside the weights,
the test accuracy and two floors that should be close: the FID between halves of the training set, which the classifier
has seen, and between the test set, which it has not, and the training set. Without classes the network learns by which of
four quarter turns an image has been turned (Gidaris et al. 2018), and is judged by that.
"""

import argparse
import json
from pathlib import Path

import torch

from ddpm.data.dataset import load_dataset
from ddpm.evaluation.classifier_training import FLOOR_DRAWS, RECIPE, features_and_accuracy, new_classifier, train_classifier
from ddpm.evaluation.metrics import fid
from ddpm.files import serialise, sha256, write_atomic
from ddpm.params import FASHION_MNIST
from ddpm.params_file import load_params
from ddpm.runtime.cli import clean_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="models/classifier.pth, or models/classifier-NAME.pth for other data")
    out, name = parser.parse_args().out, load_params().data.name
    out = out or Path(f"models/classifier{'' if name == FASHION_MNIST else f'-{name}'}.pth")
    data = load_dataset(name)
    classes = len(data.classes)

    weights = train_classifier(data.images, data.labels, classes).state_dict()
    weights = {name: w.half().contiguous() if w.is_floating_point() else w for name, w in weights.items()}
    model = new_classifier(data.images, classes)
    model.load_state_dict(weights)  # judged as it will be used: from half precision, in float32
    model.eval()
    train_features, train_accuracy = features_and_accuracy(model, data.images, data.labels, classes)
    test_features, test_accuracy = features_and_accuracy(model, data.test_images, data.test_labels, classes)
    seen, unseen = [], []
    for draw in range(FLOOR_DRAWS):  # equal n, the same number of each class, against the same half of the training set
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(draw))
        of_class = [order[data.labels[order] == c] for c in range(max(1, classes))]
        half = train_features[torch.cat([c[: len(c) // 2] for c in of_class])]
        n = len(test_features) // len(of_class)
        seen.append(fid(train_features[torch.cat([c[len(c) // 2 :][:n] for c in of_class])], half))
        unseen.append(fid(test_features, half))
    content = serialise({"weights": weights})
    card = {
        "sha256": sha256(content),
        "data": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
        # the closer these two, the less the features know their training set
        "fid_train_half_against_train_half": sum(seen) / FLOOR_DRAWS,
        "fid_test_against_train_half": sum(unseen) / FLOOR_DRAWS,
        "recipe": RECIPE,
    }
    print(json.dumps(card, indent=2))
    write_atomic(out, content)
    write_atomic(out.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())


if __name__ == "__main__":
    with clean_errors():
        main()
