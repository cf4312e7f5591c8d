"""What a folder of images means: which class each image has, and which images are held out for testing."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm.data.idx import TEST, TRAIN
from ddpm.errors import UserError
from ddpm.sources.raw_files import MIN_IMAGES

SYSTEM = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # what Windows, macOS and network drives leave in folders
SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation"), TEST),
}
PURPOSE = {TRAIN: "training", TEST: "testing"}
HOLD_OUT = 7  # one in seven images is held out if the folder isn't split: Fashion-MNIST's share
MAX_CLASSES = 256  # labels are bytes
MOST_FOLDERS = 5  # named in a message

Labelled = list[tuple[Path, int]]  # images, each with the number of its class
Names = tuple[str, ...]  # of the folders that an image lies in, and of the image


@dataclass(frozen=True)
class Layout:
    classes: list[str]  # names; none if there are no classes
    train: Labelled
    test: Labelled
    held_out: str  # which images are held out, in words


def files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files in a folder and below it, in alphabetical order, also those behind links; without hidden and system files.

    Raises UserError if a folder can't be read.
    """
    here = folder.resolve()
    if here in above:  # a link to a folder that this one lies in
        return
    try:
        paths = sorted(path for path in folder.iterdir() if not (path.name.startswith(".") or path.name.lower() in SYSTEM))
        folders = {path for path in paths if path.is_dir()}
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror})") from None
    for path in paths:
        if path in folders:
            yield from files_below(path, above | {here})
        elif path.is_file() or path.is_symlink():  # a link may lead nowhere, which is told later
            yield path


def understand(folder: Path, images: Sequence[Path]) -> Layout:
    """The layout of the images in `folder`.

    Folders called train, test and val, in any capitals, split the images; validation images are held out like test images.
    Without such folders one in seven images of each class is held out. Below that, each folder is a class; a single folder is
    none. Raises UserError if it isn't clear what the folders mean, if a class has images on one side only, or if there are too
    few.
    """
    placed = _without_common_folder([(image, _names(folder, image)) for image in images], SPLITS)
    tops = sorted({names[0] for _, names in placed if len(names) > 1})
    side_of = {top: SPLITS[top.casefold()] for top in tops if top.casefold() in SPLITS}
    others = [top for top in tops if top not in side_of]
    sides = {TRAIN: placed}
    held_out = ""
    if others and len(set(side_of.values())) == 2:
        raise UserError(
            f"{folder}: has {_listed(side_of)} and also {_listed(others)}; keep either the parts of a split or classes"
        )
    if side_of and not others:
        _refuse_loose(placed)
        sides = {side: [(image, names) for image, names in placed if side_of[names[0]] == side] for side in (TRAIN, TEST)}
        if not sides[TRAIN]:
            raise UserError(f"{folder}: has {_listed(tops)}, but no folder called train")
        if sides[TEST]:
            held_out = f"those in {_listed(top for top in tops if side_of[top] == TEST)}"
        placed = [(image, names[1:]) for image, names in placed]
    placed = _without_common_folder(placed, ())
    classes = sorted({names[0] for _, names in placed if len(names) > 1})
    if classes:
        _refuse_loose(placed)
    if len(classes) > MAX_CLASSES or not all(name.isprintable() for name in classes):
        raise UserError(f"{folder}: {len(classes)} sub-folders; there may be at most {MAX_CLASSES} classes, with printable names")
    number = {image: classes.index(names[0]) if classes else 0 for image, names in placed}
    train, test = ([(image, number[image]) for image, _ in sides.get(side, ())] for side in (TRAIN, TEST))
    if not test:
        train, test = _hold_out(train)
        held_out = f"one in {HOLD_OUT}" + (" of each class" if classes else "")
    layout = Layout(classes, train, test, held_out)
    _check_counts(folder, layout)
    return layout


def _names(folder: Path, image: Path) -> Names:
    """The names on the way from the folder to the image. macOS writes an é as two characters, others as one."""
    return tuple(unicodedata.normalize("NFC", name) for name in image.relative_to(folder).parts)


def _without_common_folder(placed: list[tuple[Path, Names]], unless: Iterable[str]) -> list[tuple[Path, Names]]:
    """Without the folder that all images lie in, if there is one and it isn't called like one of `unless`."""
    while len({names[0] for _, names in placed}) == 1 and len(placed[0][1]) > 1 and placed[0][1][0].casefold() not in unless:
        placed = [(image, names[1:]) for image, names in placed]
    return placed


def _refuse_loose(placed: list[tuple[Path, Names]]) -> None:
    """Raise UserError if some images are in folders and others aren't."""
    folders = sorted({names[0] for _, names in placed if len(names) > 1})
    for image, names in placed:
        if len(names) == 1:
            shown = folders if len(folders) <= MOST_FOLDERS else [*folders[:MOST_FOLDERS], "…"]
            raise UserError(
                f"{image}: is in none of the folders {', '.join(shown)}, as other images are; move it into one of them"
            )


def _hold_out(images: Labelled) -> tuple[Labelled, Labelled]:
    """Split into images for training and for testing: of each class every seventh, or the last one if there are fewer."""
    of_class: dict[int, Labelled] = {}
    for image, label in images:
        of_class.setdefault(label, []).append((image, label))
    train, test = [], []
    for items in of_class.values():
        held_out = set(range(HOLD_OUT - 1, len(items), HOLD_OUT)) or set(range(1, len(items))[-1:])
        test += [item for i, item in enumerate(items) if i in held_out]
        train += [item for i, item in enumerate(items) if i not in held_out]
    return train, test


def _check_counts(folder: Path, layout: Layout) -> None:
    for side, images in ((TRAIN, layout.train), (TEST, layout.test)):
        if missing := set(range(len(layout.classes))) - {label for _, label in images}:
            raise UserError(f"{folder}: class {layout.classes[min(missing)]} has no image for {PURPOSE[side]}")
        if len(images) < MIN_IMAGES:
            remedy = f"at least {MIN_IMAGES} are needed ({layout.held_out} are held out for testing)"
            raise UserError(f"{folder}: {len(images)} images for {PURPOSE[side]} are too few; {remedy}")


def _listed(names: Iterable[str]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} and {last}" if others else last
