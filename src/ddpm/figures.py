"""Pictures, from uint8 images: class grids, denoising strips and animation, nearest neighbours."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm.files import write_atomic

ZOOM = 2  # screen pixels to an image's pixel
GAP = 2
FONT_SIZE = 13
PAPER, INK = 255, 40


def sheet(images: Tensor, columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    """Images uint8 [N, H, W] or [N, H, W, 3] in rows of `columns`, with names before the rows if given."""
    images = images.numpy()
    size = images.shape[1] * ZOOM + GAP
    font = ImageFont.load_default(FONT_SIZE)
    left = max((int(font.getlength(name)) for name in row_names), default=0) + (8 if row_names else 0)
    rows = -(-len(images) // columns)
    grey = Image.new("L", (left + columns * size + GAP, rows * size + GAP), PAPER)
    canvas = grey if images.ndim == 3 else grey.convert("RGB")
    draw, ink = ImageDraw.Draw(canvas), INK if images.ndim == 3 else (INK,) * 3
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(np.repeat(np.repeat(image, ZOOM, 0), ZOOM, 1))
        canvas.paste(tile, (left + GAP + column * size, GAP + row * size))
    for row, name in enumerate(row_names):
        draw.text((left - 6, row * size + size // 2), name, fill=ink, font=font, anchor="rm")
    return canvas


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: Path, picture: Image.Image) -> None:
    write_atomic(path, png(picture))


def save_gif(path: Path, frames: Sequence[Image.Image], frame_ms: int = 100, hold_ms: int = 2500) -> None:
    """An endless animation that holds its last frame."""
    buffer = io.BytesIO()
    durations = [frame_ms] * (len(frames) - 1) + [hold_ms]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    write_atomic(path, buffer.getvalue())
