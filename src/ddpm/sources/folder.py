"""A user's own data set, out of a folder into MNIST's format: MNIST's own files, or images."""

from pathlib import Path

from ddpm.data.dataset import CLASSES_FILE
from ddpm.data.idx import TRAIN
from ddpm.errors import UserError
from ddpm.files import write_atomic
from ddpm.sources.image_folder import take_images
from ddpm.sources.mnist_files import take_mnist_files


def take_folder(folder: Path, raw: Path) -> None:
    """Put a user's data set into `raw` in MNIST's format: files that have it already, packed or not, or a folder of images.

    Images may lie in `train` and `test`, else every seventh is held out for testing; in sub-folders, which are then their
    classes, or not. Raises UserError, naming the file, where one can't be read or isn't as square and large as the others.
    """
    if not folder.is_dir():
        raise UserError(f"data.folder: {folder}: there is no such folder")
    if folder.resolve() == raw.resolve():
        raise UserError(f"data.folder: {folder}: is where the data set will be; move it elsewhere first")
    take = take_mnist_files if list(folder.glob(f"{TRAIN}-images?idx*")) else take_images
    for old in (raw / CLASSES_FILE, *raw.glob("*-ubyte")):  # the list of classes comes last: without it there is no data set
        old.unlink(missing_ok=True)
    classes = take(folder, raw)
    write_atomic(raw / CLASSES_FILE, "".join(f"{name}\n" for name in classes).encode())
