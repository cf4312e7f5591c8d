import io

import numpy as np
import torch
from PIL import Image

from ddpm.figures import gif, save_png, sheet

IMAGES = torch.randint(0, 255, (5, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)  # none is all paper
TILE, GAP = 56, 2  # 28 pixels twice as large


def test_images_lie_in_rows_left_to_right_with_gaps_of_paper():
    pixels = np.array(sheet(IMAGES, columns=3))
    assert pixels.shape == (2 * TILE + 3 * GAP, 3 * TILE + 4 * GAP)
    rest = np.ones(pixels.shape, bool)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        y, x = GAP + row * (TILE + GAP), GAP + column * (TILE + GAP)
        tile = pixels[y : y + TILE, x : x + TILE]
        for corner in (tile[::2, ::2], tile[1::2, ::2], tile[::2, 1::2], tile[1::2, 1::2]):
            assert (corner == IMAGES[i].numpy()).all(), f"image {i}"
        rest[y : y + TILE, x : x + TILE] = False
    assert (pixels[rest] == 255).all()


def test_names_widen_the_canvas_and_change_no_image():
    plain = np.array(sheet(IMAGES, columns=3))
    short = np.array(sheet(IMAGES, columns=3, row_names=["Bag", "Coat"]))
    long = np.array(sheet(IMAGES, columns=3, row_names=["Bag", "A rather longer name"]))
    height, width = plain.shape
    assert height == short.shape[0] == long.shape[0]
    assert width < short.shape[1] < long.shape[1]
    for named in (short, long):
        assert (named[:, -width:] == plain).all()
    margin = short[:, :-width]
    for half in (margin[: height // 2], margin[height // 2 :]):  # a name beside each row, clear of the canvas's edge
        assert half.min() < 100
    assert (margin[:, 0] == 255).all()


def test_png_is_lossless_and_its_bytes_repeat(tmp_path):
    picture = sheet(IMAGES, columns=5, row_names=["Sandal"])
    for name in ("a.png", "b.png"):
        save_png(tmp_path / "new" / name, picture)
    assert (tmp_path / "new/a.png").read_bytes() == (tmp_path / "new/b.png").read_bytes()
    with Image.open(tmp_path / "new/a.png") as decoded:
        assert decoded.format == "PNG"
        assert (np.array(decoded) == np.array(picture)).all()


def test_gif_plays_every_frame_for_ever_and_holds_the_last():
    frames = [sheet(image[None], columns=1) for image in IMAGES]
    content = gif(frames, frame_ms=70, hold_ms=900)
    with Image.open(io.BytesIO(content)) as animation:
        assert animation.n_frames == 5
        assert animation.info["loop"] == 0
        durations = []
        for i, frame in enumerate(frames):
            animation.seek(i)
            durations.append(animation.info["duration"])
            assert (np.array(animation.convert("L")) == np.array(frame)).all(), f"frame {i}"
        assert durations == [70, 70, 70, 70, 900]


def test_gif_of_frames_that_stand_still_lasts_as_long():
    still = sheet(IMAGES[:1], columns=1)
    content = gif([still, still, sheet(IMAGES[1:2], columns=1)], frame_ms=100, hold_ms=500)
    with Image.open(io.BytesIO(content)) as animation:
        total = 0
        for i in range(animation.n_frames):
            animation.seek(i)
            total += animation.info["duration"]
    assert total == 700
