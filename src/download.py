"""Stage 1, `python src/download.py`: put the data set of params.yaml into data/<name>/raw, in MNIST's format.

Fashion-MNIST, MNIST and CIFAR10 are downloaded and verified, unless data.folder has their files. Other data sets are taken from
the folder that data.folder names. The last lines say what was found there, and how it was understood.
"""

import argparse
import time

from ddpm.data.fashion_mnist import CLASSES
from ddpm.params import DOWNLOADABLE, FASHION_MNIST, DataParams
from ddpm.params_file import load_params
from ddpm.paths import CACHE, project_root, raw_folder
from ddpm.runtime.cli import clean_errors, duration
from ddpm.sources.download import download
from ddpm.sources.named import take_named
from ddpm.sources.raw_files import Taken
from ddpm.sources.user_folder import existing_folder, take_folder


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    p, began = load_params().data, time.monotonic()
    taken = take(p)
    print(f"download: {p.name} in {raw_folder(p.name)}: {taken} ({duration(time.monotonic() - began)})")
    for note in taken.notes:
        print(f"  {note}")


def take(p: DataParams) -> Taken:
    """Get the data set that `p` describes into its raw folder."""
    raw, cache = raw_folder(p.name), project_root() / CACHE
    size = None if p.size == "auto" else p.size
    folder = existing_folder(p.folder) if p.folder is not None else None
    if p.name == FASHION_MNIST:
        download(raw, cache, folder)
        return Taken(list(CLASSES), (28, 28), 60_000, 10_000)
    if p.name in DOWNLOADABLE:
        return take_named(p.name, raw, cache, folder, size)
    assert folder is not None, "params.py refuses other data sets without a folder"
    return take_folder(folder, raw, size)


if __name__ == "__main__":
    with clean_errors():
        main()
