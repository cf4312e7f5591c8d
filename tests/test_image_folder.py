"""Pictures of any size, mode and orientation as squares of one size, and the files of a folder that are none."""

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.data.dataset import load_dataset
from ddpm.errors import UserError
from ddpm.sources.image_folder import is_grey, side_of, square
from ddpm.sources.raw_files import Taken
from ddpm.sources.user_folder import take_folder

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    """The image as it comes out of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


def pixels(image: Image.Image, side: int = 8, mode: str = "RGB") -> np.ndarray:
    made = square(image, side, mode)
    assert (made.size, made.mode) == ((side, side), mode)
    return np.asarray(made)


def with_holes(mode: str) -> Image.Image:
    """Red, or light grey, on the left; on the right blue, or dark grey, under full transparency."""
    image = Image.new("RGBA", (8, 8), (*RED, 255)) if mode == "RGBA" else Image.new("LA", (8, 8), (200, 255))
    image.paste((*BLUE, 0) if mode == "RGBA" else (30, 0), (4, 0, 8, 8))
    return image


def palette(transparent: bool) -> Image.Image:
    """Red on the left; on the right blue, which a GIF declares transparent."""
    image = Image.new("P", (8, 8))
    image.putpalette([*RED, *BLUE])
    image.paste(1, (4, 0, 8, 8))
    return stored(image, "GIF", **({"transparency": 1} if transparent else {}))


MODES = {  # image, mode, what its left and its right pixels become
    "black and white": (stored(Image.fromarray(np.tile([True] * 4 + [False] * 4, (8, 1)))), "L", 255, 0),
    "grey with holes": (stored(with_holes("LA")), "L", 200, 255),
    "grey with holes, made RGB": (stored(with_holes("LA")), "RGB", (200,) * 3, WHITE),
    "colours with holes": (stored(with_holes("RGBA")), "RGB", RED, WHITE),
    "a palette": (palette(transparent=False), "RGB", RED, BLUE),
    "a palette with holes": (palette(transparent=True), "RGB", RED, WHITE),
    "RGB with a transparent colour": (stored(with_holes("RGBA").convert("RGB"), transparency=BLUE), "RGB", RED, WHITE),
    "CMYK": (stored(Image.new("RGB", (8, 8), RED).convert("CMYK"), "TIFF"), "RGB", RED, RED),
    "16 bits": (stored(Image.fromarray(np.full((8, 8), 32896, np.uint16))), "L", 128, 128),
    "16 bits, in a PGM": (stored(Image.fromarray(np.full((8, 8), 65535, np.uint16)), "PPM"), "L", 255, 255),
    "32 bits that hold 16": (Image.fromarray(np.full((8, 8), 257 * 7, np.int32)), "L", 7, 7),
    "numbers from 0 to 1": (stored(Image.fromarray(np.full((8, 8), 0.2, np.float32)), "TIFF"), "L", 51, 51),
    "half transparent": (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "RGB", (127,) * 3, (127,) * 3),
}


@pytest.mark.parametrize("case", MODES)
def test_any_mode_becomes_grey_or_rgb(case):
    image, mode, left, right = MODES[case]
    made = pixels(image, mode=mode)
    assert (made[:, :4] == left).all() and (made[:, 4:] == right).all()
    assert is_grey(image) == (mode == "L" or case == "grey with holes, made RGB")


@pytest.mark.parametrize(
    ("array", "values"),
    [
        pytest.param(np.full((8, 8), 2.0, np.float32), "from 2.0 to 2.0; at most 0 to 1.0 are supported", id="floating-point"),
        pytest.param(np.full((8, 8), np.nan, np.float32), "from nan to nan", id="not a number"),
        pytest.param(np.full((8, 8), -1, np.int32), "from -1 to -1; at most 0 to 65535 are supported", id="negative"),
        pytest.param(np.full((8, 8), 65536, np.int32), "from 65536 to 65536", id="more than 16 bits"),
    ],
)
def test_values_whose_range_is_not_clear_are_refused(array, values):
    with pytest.raises(ValueError, match=f"^pixel values {re.escape(values)}"):
        square(Image.fromarray(array), 8, "L")


def test_a_palette_of_greys_is_grey():
    image = Image.new("P", (8, 8))
    image.putpalette([value for grey in range(256) for value in (grey,) * 3])
    assert is_grey(stored(image))
    image.putpalette([*RED, *BLUE])
    assert not is_grey(stored(image))


TURNED = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose, 6: np.rot90}
TURNED |= {1: lambda x: x, 7: lambda x: np.rot90(np.transpose(x), 2), 8: lambda x: np.rot90(x, 3)}


@pytest.mark.parametrize("orientation", sorted(TURNED))
def test_pictures_are_put_upright(orientation):
    """`TURNED` is how the camera held the picture; the sixth orientation asks for a quarter turn to the right."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image = stored(Image.fromarray(np.ascontiguousarray(TURNED[orientation](RAMP))), "PNG", exif=exif)
    assert np.array_equal(pixels(image, mode="L"), RAMP)


def test_squares_of_the_right_size_keep_their_pixels():
    assert np.array_equal(pixels(stored(Image.fromarray(COLOURS))), COLOURS)
    assert np.array_equal(pixels(stored(Image.fromarray(RAMP)), mode="L"), RAMP)


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (41, 57), (640, 480)])
def test_the_middle_is_what_remains(width, height):
    """A picture that is green in its middle square and red around it."""
    image, side = Image.new("RGB", (width, height), RED), min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    image.paste(GREEN, (int(np.floor(left)), int(np.floor(top)), int(np.ceil(left + side)), int(np.ceil(top + side))))
    assert abs(pixels(image, side=32)[1:-1, 1:-1].astype(int) - GREEN).max() <= 2  # the filter looks a little beyond the edge


def test_scaling_does_not_alias():
    """A checkerboard of single pixels is even grey at half the size; taking every other pixel would leave one colour."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    made = pixels(Image.fromarray(board.astype(np.uint8)), side=32, mode="L")
    assert abs(made[4:-4, 4:-4].astype(int) - 127).max() <= 2


def test_large_photos_are_decoded_as_small_as_will_do():
    array = np.kron(COLOURS, np.ones((200, 200, 1), np.uint8))
    photo = stored(Image.fromarray(array), "JPEG", quality=95)
    made = pixels(photo, side=32)
    assert photo.size == (200, 200)  # of 1 600
    whole = Image.fromarray(array).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.abs(made.astype(int) - np.asarray(whole)).mean() < 3


SIDES = [
    ({(28, 28): 5}, 28),
    ({(100, 100): 5}, 100),  # all square and equal, so they stay
    ({(256, 256): 5}, 256),
    ({(3024, 3024): 5}, 64),  # too large to stay
    ({(4, 4): 5}, 32),  # too small
    ({(64, 64): 5, (60, 40): 3}, 64),
    ({(64, 64): 3, (60, 40): 5}, 32),
    ({(64, 64): 3, (60, 40): 3}, 32),  # not most of them
    ({(640, 480): 5}, 64),
    ({(40, 60): 5}, 32),
    ({(20, 30): 5}, 32),
]


@pytest.mark.parametrize(("sizes", "side"), SIDES)
def test_the_size_is_chosen_by_most_of_the_images(sizes, side):
    assert side_of(Counter(sizes), None) == side
    assert side_of(Counter(sizes), 48) == 48


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty one, where data sets are put."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(folder: Path, count: int, size: tuple[int, int] = (8, 8), suffix: str = ".png", mode: str = "L") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new(mode, size, i % 256 if mode == "L" else (i % 256, 0, 0)).save(folder / f"{i:03d}{suffix}")


def take(folder: Path, size: int | None = None) -> Taken:
    return take_folder(folder, Path("data/mine/raw"), size)


def test_one_coloured_image_makes_all_of_them_rgb(workspace):
    save(workspace / "all", 70)
    Image.new("RGB", (8, 8), RED).save(workspace / "all/x.png")
    taken = take(workspace / "all")
    assert str(taken) == "71 colour images of 8×8 pixels, without classes"
    assert load_dataset("mine").image_shape == (3, 8, 8)


def test_the_last_lines_say_what_was_found_and_done(workspace):
    save(workspace / "all/cat", 70, (64, 64))
    save(workspace / "all/dog", 14, (60, 40), ".jpg")
    for i in range(6):
        (workspace / f"all/dog/{i}.txt").write_text("no picture")
    taken = take(workspace / "all")
    assert str(taken) == "84 grey images of 64×64 pixels, 2 classes: cat, dog"
    assert taken.notes == [
        "one class per folder; held out for testing: 12 images, one in 7 of each class",
        "scaled to 64×64 pixels and cropped to the middle; they were of 2 sizes, 60×40 to 64×64 (data.size sets the size)",
        "left out: 6 files that can't be opened as images (dog/0.txt, dog/1.txt, dog/2.txt, dog/3.txt, dog/4.txt, …)",
    ]
    assert load_dataset("mine").images.shape == (72, 64, 64)
    assert str(take(workspace / "all", 16)).startswith("84 grey images of 16×16 pixels")
    assert load_dataset("mine").images.shape == (72, 16, 16)


def test_of_many_classes_some_are_named(workspace):
    for i in range(20):
        save(workspace / f"all/class{i:02d}", 7)
    names = ", ".join(f"class{i:02d}" for i in range(10))
    assert str(take(workspace / "all")) == f"140 grey images of 8×8 pixels, 20 classes: {names}, …, class19"


@pytest.mark.parametrize("name", ["x.jfif", "x", "x.txt", "X.PNG"])
def test_images_are_known_by_their_content(workspace, name):
    save(workspace / "all", 70)
    Image.new("L", (8, 8)).save(workspace / "all" / name, "JPEG")
    assert str(take(workspace / "all")).startswith("71 grey images")


def test_files_that_pillow_knows_but_can_not_decode_are_left_out(workspace):
    save(folder := workspace / "all", 70)
    (folder / "labels.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    Image.new("L", (8, 8)).save(folder / "photo.NEF", "TIFF")  # raw files of cameras begin like this, with a small preview
    (folder / "clip.mpg").write_bytes(bytes.fromhex("000001b3140 0f0".replace(" ", "")) + bytes(100))
    assert take(folder).notes[1:] == ["left out: 3 files that can't be opened as images (clip.mpg, labels.h5, photo.NEF)"]


def test_linked_classes_and_images_are_taken(workspace):
    save(workspace / "all/cat", 70)
    save(workspace / "elsewhere", 70)
    (workspace / "all/dog").symlink_to(workspace / "elsewhere")
    (workspace / "all/cat/x.png").symlink_to(workspace / "elsewhere/000.png")
    assert str(take(workspace / "all")) == "141 grey images of 8×8 pixels, 2 classes: cat, dog"


def test_all_images_that_can_not_be_read_are_told_at_once(workspace):
    save(folder := workspace / "all", 70)
    whole = (folder / "001.png").read_bytes()
    (folder / "a.png").write_bytes(b"no image")
    (folder / "b.png").write_bytes(whole[:50])
    (folder / "c.jpg").write_bytes(b"")
    (folder / "d.png").symlink_to(folder / "nowhere.png")
    Image.fromarray(np.full((8, 8), 2.0, np.float32)).save(folder / "e.tif")
    with pytest.raises(UserError) as caught:
        take(folder)
    first, a, b, c, d, e = str(caught.value).splitlines()
    assert first == "5 images can't be read; repair or remove them:"
    assert a == f"{folder}/a.png: not an image, or a damaged one"
    assert b.startswith(f"{folder}/b.png: can't be read (")
    assert c == f"{folder}/c.jpg: not an image, or a damaged one"
    assert d == f"{folder}/d.png: a link to a file that doesn't exist"
    assert e == f"{folder}/e.tif: can't be read (pixel values from 2.0 to 2.0; at most 0 to 1.0 are supported)"
    with pytest.raises(UserError, match=r"`python src/download.py` (re)?creates it$"):
        load_dataset("mine")


def test_of_very_many_that_can_not_be_read_some_are_told(workspace):
    save(folder := workspace / "all", 70)
    for i in range(30):
        (folder / f"bad{i:02d}.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        take(folder)
    lines = str(caught.value).splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("30 images can't be read; repair or remove them:", "… and 10 more", 22)


def test_half_transparent_edges_blend_into_the_background_before_they_are_scaled(workspace):
    """Black hidden under transparency doesn't darken the edge of a white disc."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (16, 16, 48, 48))
    assert (pixels(image, side=32) == 255).all()
