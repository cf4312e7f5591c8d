"""Stage 1, `python src/download.py`: the data set, in MNIST's format, in data/<name>/raw; Fashion-MNIST's bytes verified."""

import argparse
from pathlib import Path

from ddpm.params import FASHION_MNIST
from ddpm.params_file import load_params
from ddpm.paths import project_root, raw_folder
from ddpm.runtime.cli import clean_errors
from ddpm.sources.download import download
from ddpm.sources.folder import take_folder


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    p = load_params().data
    raw, folder = raw_folder(p.name), Path(p.folder).expanduser() if p.folder else None
    if p.name == FASHION_MNIST:
        download(raw, project_root() / ".cache", folder)
    else:
        take_folder(folder, raw)
    print(f"{p.name} is in {raw}")


if __name__ == "__main__":
    with clean_errors():
        main()
