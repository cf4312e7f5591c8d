"""What a folder of images is understood as: its classes, and which images are held out for testing."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from ddpm.errors import UserError
from ddpm.sources.layout import Layout, files_below, understand

FOLDER = Path("/pictures")
COMPOSED, DECOMPOSED = "\u00e9", "e\u0301"  # the same é, as Linux and as macOS write it


def images(**folders: int) -> list[Path]:
    """So many images in each of these sub-folders; __ in a name stands for a slash, and `here` for the folder itself."""
    names = {"" if name == "here" else name.replace("__", "/"): count for name, count in folders.items()}
    return sorted(FOLDER / name / f"{i:03d}.png" for name, count in names.items() for i in range(count))


def counts(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """How many images of each class there are for training and for testing."""
    names = layout.classes or ["-"]
    train, test = (Counter(names[label] for _, label in side) for side in (layout.train, layout.test))
    return dict(train), dict(test)


UNDERSTOOD = {  # what it is: images, training images by class, test images by class, which are held out
    "flat": (images(here=70), {"-": 60}, {"-": 10}, "one in 7"),
    "a folder per class": (images(cat=70, dog=140), {"cat": 60, "dog": 120}, {"cat": 10, "dog": 20}, "one in 7 of each class"),
    "folders within a class": (
        images(cat__wild__old=35, cat__tame=35, dog=70),
        {"cat": 60, "dog": 60},
        {"cat": 10, "dog": 10},
        "one in 7 of each class",
    ),
    "train and test": (
        images(train__cat=20, train__dog=20, test__cat=10, test__dog=10),
        {"cat": 20, "dog": 20},
        {"cat": 10, "dog": 10},
        "those in test",
    ),
    "train and test without classes": (images(train=20, test=10), {"-": 20}, {"-": 10}, "those in test"),
    "in capitals": (images(TRAIN__a=20, TRAIN__b=9, Test__a=9, Test__b=9), {"a": 20, "b": 9}, {"a": 9, "b": 9}, "those in Test"),
    "train and val": (images(train__a=20, train__b=20, val__a=8, val__b=8), {"a": 20, "b": 20}, {"a": 8, "b": 8}, "those in val"),
    "training and validation": (images(training=20, validation=11), {"-": 20}, {"-": 11}, "those in validation"),
    "validation joins the test images": (
        images(train__a=20, train__b=20, valid__a=9, test__b=9),
        {"a": 20, "b": 20},
        {"a": 9, "b": 9},
        "those in test and valid",
    ),
    "train alone": (images(train__a=70, train__b=70), {"a": 60, "b": 60}, {"a": 10, "b": 10}, "one in 7 of each class"),
    "train alone without classes": (images(Train=70), {"-": 60}, {"-": 10}, "one in 7"),
    "a single folder is no class": (images(flowers=70), {"-": 60}, {"-": 10}, "one in 7"),
    "a single folder in each part of a split": (images(train__images=20, test__images=10), {"-": 20}, {"-": 10}, "those in test"),
    "everything inside one folder": (
        images(pets__cat=70, pets__dog=70),
        {"cat": 60, "dog": 60},
        {"cat": 10, "dog": 10},
        "one in 7",
    ),
    "a split inside two folders": (images(a__b__train=20, a__b__test=10), {"-": 20}, {"-": 10}, "those in test"),
    "trains beside buses": (
        images(bus=70, train=70),
        {"bus": 60, "train": 60},
        {"bus": 10, "train": 10},
        "one in 7 of each class",
    ),
    "a class of few": (images(a=70, b=2), {"a": 60, "b": 1}, {"a": 10, "b": 1}, "one in 7 of each class"),
    "the same letter written twice": (
        images(**{f"train__{COMPOSED}": 20, "train__a": 20, f"test__{DECOMPOSED}": 9, "test__a": 9}),
        {COMPOSED: 20, "a": 20},
        {COMPOSED: 9, "a": 9},
        "those in test",
    ),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_a_layout_is_understood(case):
    found, train, test, held_out = UNDERSTOOD[case]
    layout = understand(FOLDER, found)
    assert counts(layout) == (train, test)
    assert layout.held_out.startswith(held_out)
    assert sorted(path for path, _ in layout.train + layout.test) == found  # each image once
    assert layout.classes == sorted(name for name in train if name != "-")


REFUSED = {  # what it is: images, the start of the line
    "an image beside classes": (
        images(a=70, b=70, here=1),
        "/pictures/000.png: is in none of the folders a, b, as other images are; move",
    ),
    "an image beside a split": (
        images(train=70, val=70, here=1),
        "/pictures/000.png: is in none of the folders train, val, as other images are",
    ),
    "an image beside the classes of a split": (
        images(train__a=20, train__b=20, train=1, test__a=9, test__b=9),
        "/pictures/train/000.png: is in none of the folders a, b, as other images are; move it into one of them",
    ),
    "a split beside another folder": (
        images(train__a=20, train__b=20, test__a=9, test__b=9, extra=5),
        "/pictures: has test and train and also extra; keep either the parts of a split or classes",
    ),
    "classes on one side only": (
        images(train__a=20, train__b=20, test=20),
        "/pictures/test/000.png: is in none of the folders a, b, as other images are; move it into one of them",
    ),
    "no training images": (images(test__a=70, val__a=70), "/pictures: has test and val, but no folder called train"),
    "a class that isn't tested": (
        images(train__a=20, train__b=20, test__a=10),
        "/pictures: class b has no image for testing",
    ),
    "a class that isn't trained": (
        images(train__a=20, test__a=10, test__b=10),
        "/pictures: class b has no image for training",
    ),
    "a class of one image": (images(a=70, b=1), "/pictures: class b has no image for testing"),
    "few images": (
        images(here=69),
        "/pictures: 9 images for testing are too few; at least 10 are needed (one in 7 are held out for testing)",
    ),
    "few training images": (images(train=9, test=20), "/pictures: 9 images for training are too few; at least 10 are needed"),
    "too many classes": (
        images(**{f"c{i}": 2 for i in range(257)}),
        "/pictures: 257 sub-folders; there may be at most 256 classes, with printable names",
    ),
    "a name that can't be printed": (images(**{"a\n": 70, "b": 70}), "/pictures: 2 sub-folders; there may be at most 256"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_is_not_clear_is_told_in_one_line(case):
    found, line = REFUSED[case]
    with pytest.raises(UserError, match=f"^{re.escape(line)}") as caught:
        understand(FOLDER, found)
    assert "\n" not in str(caught.value)


def test_files_behind_links_are_found_and_hidden_ones_and_the_system_s_are_not(tmp_path):
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for name in ("a/1.png", "a/.hidden.png", "a/Thumbs.db", ".git/x.png", "__MACOSX/1.png", "@eaDir/1.png", "Desktop.ini", "b/2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep/3.png").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "a/4.png").symlink_to(elsewhere / "deep/3.png")
    (folder / "a/loop").symlink_to(folder)
    (folder / "lost.png").symlink_to(tmp_path / "nowhere")
    found = [path.relative_to(folder).as_posix() for path in files_below(folder)]
    assert found == ["a/1.png", "a/4.png", "b/2", "linked/deep/3.png", "lost.png"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_can_not_be_read_is_told(tmp_path):
    (tmp_path / "a").mkdir(mode=0)
    with pytest.raises(UserError, match=r"/a: can't be read \(Permission denied\)$"):
        list(files_below(tmp_path))


def test_a_large_folder_is_understood_quickly():
    """Quadratic time would take minutes."""
    layout = understand(FOLDER, [FOLDER / f"{i:06d}.png" for i in range(200_000)])
    assert (len(layout.train), len(layout.test)) == (171_429, 28_571)
