"""Stage 1, `python src/download.py`: put the data set of params.yaml into data/<name>/raw, in MNIST's format.

Fashion-MNIST is downloaded, and its files are verified. Other data sets are taken from the folder that data.folder names.
"""

import argparse
import time
from pathlib import Path

from ddpm.params import FASHION_MNIST
from ddpm.params_file import load_params
from ddpm.paths import CACHE, project_root, raw_folder
from ddpm.runtime.cli import clean_errors, duration
from ddpm.sources.download import download
from ddpm.sources.user_folder import take_folder


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    p, began = load_params().data, time.monotonic()
    raw, folder = raw_folder(p.name), Path(p.folder).expanduser() if p.folder else None
    if p.name == FASHION_MNIST:
        download(raw, project_root() / CACHE, folder)
    else:
        assert folder is not None, "params.py refuses other data sets without a folder"
        take_folder(folder, raw)
    print(f"download: {p.name} in {raw} ({duration(time.monotonic() - began)})")


if __name__ == "__main__":
    with clean_errors():
        main()
