"""Takes a data set from a user's folder: MNIST's four files, or images."""

from pathlib import Path

from ddpm.data.idx import TRAIN
from ddpm.errors import UserError
from ddpm.paths import project_root
from ddpm.sources.image_folder import take_images
from ddpm.sources.mnist_files import take_mnist_files
from ddpm.sources.raw_files import Taken, completed


def take_folder(folder: Path, raw: Path, size: int | None = None) -> Taken:
    """Write the data set in `folder` to `raw`, in MNIST's format: MNIST's four files, packed or not, or images.

    Raises UserError as `take_mnist_files` and `take_images` do.
    """
    if raw.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"data.folder: {folder}: the data set will be written to this folder; move your files elsewhere first")
    take = take_mnist_files if list(folder.glob(f"{TRAIN}-images?idx*")) else take_images
    return completed(raw, lambda: take(folder, raw, size))


def existing_folder(name: str) -> Path:
    """The folder that data.folder names: ~ is a home folder, and relative paths start at the repository's root.

    Raises UserError if there is no such folder.
    """
    try:
        folder = project_root() / Path(name).expanduser()  # not in the temporary workspace of an experiment
        is_there = folder.is_dir()
    except RuntimeError:
        raise UserError(f"data.folder: {name}: there is no user {name.partition('/')[0].removeprefix('~')}") from None
    except OSError as error:
        raise UserError(f"data.folder: {name}: can't be read ({error.strerror})") from None
    if not is_there:
        raise UserError(f"data.folder: {folder}: there is no such folder")
    return folder
