"""Stage 1, `python src/download.py`: Fashion-MNIST's four files, verified, in data/FashionMNIST/raw."""

from pathlib import Path

from ddpm.data import RAW, download
from ddpm.params import clean_errors, load_params, project_root


def main() -> None:
    folder = load_params().runtime.data_folder
    download(RAW, project_root() / ".cache", Path(folder).expanduser() if folder else None)
    print(f"Fashion-MNIST is in {RAW}")


if __name__ == "__main__":
    with clean_errors():
        main()
