"""Takes a data set from a user's folder: MNIST's four files, or images."""

from pathlib import Path

from ddpm.data.dataset import CLASSES_FILE
from ddpm.data.idx import TRAIN
from ddpm.errors import UserError
from ddpm.files import write_atomic
from ddpm.sources.image_folder import take_images
from ddpm.sources.mnist_files import take_mnist_files


def take_folder(folder: Path, raw: Path) -> None:
    """Write the data set in `folder` to `raw`, in MNIST's format.

    `folder` has MNIST's four files, packed or not, or images. Images may be split into the sub-folders `train` and `test`;
    otherwise every seventh is used for testing. Below that, each sub-folder is a class; without sub-folders there are no classes.
    Raises UserError, with the name of the file, if one can't be read or isn't square and of the same size as the others.
    """
    if not folder.is_dir():
        raise UserError(f"data.folder: {folder}: there is no such folder")
    if folder.resolve() == raw.resolve():
        raise UserError(f"data.folder: {folder}: the data set will be written to this folder; move your files elsewhere first")
    take = take_mnist_files if list(folder.glob(f"{TRAIN}-images?idx*")) else take_images
    for old in (raw / CLASSES_FILE, *raw.glob("*-ubyte")):
        old.unlink(missing_ok=True)
    classes = take(folder, raw)
    # The list of classes is written last and deleted first, so an incomplete data set has none and isn't loaded.
    write_atomic(raw / CLASSES_FILE, "".join(f"{name}\n" for name in classes).encode())
