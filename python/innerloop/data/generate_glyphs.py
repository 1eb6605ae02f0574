"""Renders the glyphs data set: ``python -m innerloop.data.generate_glyphs [FILE]`` (needs matplotlib, Pillow, scipy).

One class is a Unicode letter, 20 samples a class: a face of matplotlib's DejaVu fonts, an affine jitter and an elastic
one. Letters that look alike are kept once. The same versions of the libraries give the same bytes.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

SIZE = 28
SAMPLES = 20
CANVAS = 112  # letters are drawn four times as large, then jittered and reduced
MARGIN = 16
HOMOGLYPH_COSINE = 0.985
SEED = 20260101

# Splits by script, as Omniglot splits by alphabet; first the sets that keep their letter where two look alike.
SCRIPTS = {
    "test": ("ARMENIAN", "GREEK", "LAO", "HEBREW"),
    "val": ("CYRILLIC", "ARABIC", "COPTIC", "LISU"),
    "train": ("LATIN", "CANADIAN SYLLABICS", "GEORGIAN", "OLD ITALIC"),
}

FACES = (
    "DejaVuSans", "DejaVuSerif", "DejaVuSansMono",
    "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold",
    "DejaVuSans-Oblique", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique",
)  # fmt: skip


def font_path(face: str) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def letters(covered: set[int]) -> list[tuple[str, str, str]]:
    """(split, script, letter) of every letter that some face has, small capitals left out."""
    found = []
    for split, scripts in SCRIPTS.items():
        for script in scripts:
            for code in sorted(covered):
                letter = chr(code)
                name = unicodedata.name(letter, "")
                if (
                    name.startswith(script + " ")
                    and unicodedata.category(letter) in ("Lu", "Ll", "Lo")
                    and not unicodedata.decomposition(letter)
                    and "SMALL CAPITAL" not in name
                ):
                    found.append((split, script.title(), letter))
    return found


def draw(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """The letter in the middle of a canvas, at the size that fills it up to the margin, values 0 … 1."""
    left, top, right, bottom = font.getbbox(letter)
    if right <= left or bottom <= top:
        return np.zeros((CANVAS, CANVAS), np.float32)
    ink = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(ink).text((1 - left, 1 - top), letter, fill=255, font=font)
    scale = (CANVAS - 2 * MARGIN) / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BILINEAR)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink, ((CANVAS - ink.width) // 2, (CANVAS - ink.height) // 2))
    return np.asarray(canvas, np.float32) / 255


def jitter(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A small affine and elastic deformation, reduced to SIZE × SIZE and one bit."""
    angle, shear = np.deg2rad(random.uniform(-6, 6)), random.uniform(-0.1, 0.1)
    stretch = random.uniform(0.92, 1.12, size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(stretch)
    middle = (CANVAS - 1) / 2
    grid = np.stack(np.meshgrid(*[np.arange(CANVAS) - middle] * 2, indexing="ij"))
    shift = random.uniform(-4, 4, size=2)
    where = np.tensordot(affine, grid, axes=1) + middle + shift[:, None, None]
    bend = ndimage.gaussian_filter(random.standard_normal((2, 14, 14)), (0, 2, 2))
    bend = ndimage.zoom(bend, (1, CANVAS / 14, CANVAS / 14), order=1)
    where += bend * (3.5 / bend.std())  # 0.9 pixels of the reduced image
    warped = ndimage.map_coordinates(image, where, order=1)
    small = warped.reshape(SIZE, CANVAS // SIZE, SIZE, CANVAS // SIZE).mean(axis=(1, 3))
    return small > 0.45 * small.max()


def without_homoglyphs(drawn: list[np.ndarray]) -> list[int]:
    """Indices of the letters to keep: each looks like none that is kept before it."""
    flat = np.stack([ndimage.gaussian_filter(image, 2).ravel()[::3] for image in drawn])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9
    alike = flat @ flat.T > HOMOGLYPH_COSINE
    kept: list[int] = []
    for index, row in enumerate(alike):
        if drawn[index].any() and not row[kept].any():
            kept.append(index)
    return kept


def render() -> dict[str, np.ndarray]:
    """The arrays of the file: packed bits [classes, 20, 98], letters, scripts and splits of the classes."""
    covers = {face: set(FT2Font(str(font_path(face))).get_charmap()) for face in FACES}
    fonts = {face: ImageFont.truetype(str(font_path(face)), 96) for face in FACES}
    found = letters(set.union(*covers.values()))
    first_face = {letter: next(face for face in FACES if ord(letter) in covers[face]) for _, _, letter in found}
    kept = without_homoglyphs([draw(letter, fonts[first_face[letter]]) for _, _, letter in found])
    bits = []
    for _, _, letter in (found[index] for index in kept):
        faces = [face for face in FACES if ord(letter) in covers[face]]
        drawn = {face: draw(letter, fonts[face]) for face in faces}
        random = np.random.default_rng((SEED, ord(letter)))
        samples = [jitter(drawn[faces[number % len(faces)]], random) for number in range(SAMPLES)]
        bits.append(np.packbits(np.stack(samples).reshape(SAMPLES, -1), axis=1))
    return {
        "bits": np.stack(bits),
        "letters": np.array([found[index][2] for index in kept]),
        "scripts": np.array([found[index][1] for index in kept]),
        "splits": np.array([found[index][0] for index in kept]),
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("glyphs.npz")
    arrays = render()
    np.savez_compressed(target, allow_pickle=False, **arrays)
    print(f"{target}: {target.stat().st_size:,} bytes")
