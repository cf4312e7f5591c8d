"""Images arranged into pictures: sheets in rows and columns, as PNG and as animated GIF."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm.files import write_atomic

ZOOM, SMALL = 2, 48  # in images of at most SMALL pixels along a side, each pixel becomes ZOOM × ZOOM pixels
LARGE = 128  # pixels along a side; larger images are shown in this size
GAP = 2  # pixels between images
FONT_SIZE = 13
PAPER, INK = 255, 40  # grey levels of the background and of the text


def sheet(images: Tensor, columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    """Images uint8 [N, H, H] or [N, H, H, 3], `columns` in a row. `row_names`, if given, are written to the left of the rows."""
    pixels = images.numpy()
    side = pixels.shape[1] * ZOOM if pixels.shape[1] <= SMALL else min(pixels.shape[1], LARGE)
    size = side + GAP
    font = ImageFont.load_default(FONT_SIZE)
    left = max((int(font.getlength(name)) for name in row_names), default=0) + (8 if row_names else 0)
    rows = -(-len(pixels) // columns)
    grey = Image.new("L", (left + columns * size + GAP, rows * size + GAP), PAPER)
    canvas = grey if pixels.ndim == 3 else grey.convert("RGB")
    draw, ink = ImageDraw.Draw(canvas), INK if pixels.ndim == 3 else (INK,) * 3
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        how = Image.Resampling.NEAREST if side > pixels.shape[1] else Image.Resampling.LANCZOS
        tile = Image.fromarray(image).resize((side, side), how)
        canvas.paste(tile, (left + GAP + column * size, GAP + row * size))
    for row, name in enumerate(row_names):
        draw.text((left - 6, row * size + size // 2), name, fill=ink, font=font, anchor="rm")
    return canvas


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: Path, picture: Image.Image) -> None:
    write_atomic(path, png(picture))


def gif(frames: Sequence[Image.Image], frame_ms: int = 100, hold_ms: int = 2500) -> bytes:
    """The bytes of an animation that repeats endlessly and holds its last frame for `hold_ms`."""
    buffer = io.BytesIO()
    durations = [frame_ms] * (len(frames) - 1) + [hold_ms]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    return buffer.getvalue()


def save_gif(path: Path, frames: Sequence[Image.Image]) -> None:
    write_atomic(path, gif(frames))
