"""A labelling as a page: one HTML file with every image inside it (needs Pillow, the extra ``images``)."""

from __future__ import annotations

import base64
import io
from collections import Counter
from html import escape
from pathlib import Path

from PIL import Image

from innerloop.adaptation import LabelledImage, Labelling, shown_name
from innerloop.data.images import read_image

THUMBNAIL = 192  # pixels, twice the size shown, for dense screens

# Told apart by people with any colour vision (Okabe and Ito 2008); classes beyond them start again.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6a5acd", "#7f7f7f")

STYLE = """
:root { color-scheme: light dark; --card: #fff; --page: #f5f5f3; --text: #1d1d1b; --faint: #6b6b66; --line: #deded9; }
@media (prefers-color-scheme: dark) {
  :root { --card: #242422; --page: #181816; --text: #ececea; --faint: #a3a39c; --line: #3a3a36; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 2rem 1.5rem 4rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { color: var(--faint); margin: .3rem 0 0; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h3::before, .label::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .45em;
  border-radius: 50%; background: var(--class); }
.classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .9rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .9rem; }
.class, figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.class div { display: flex; flex-wrap: wrap; gap: .4rem; }
.class img { width: 56px; height: 56px; }
figure img { width: 96px; height: 96px; display: block; margin: 0 auto .6rem; }
img { object-fit: contain; background: #8882; border-radius: 4px; }
img.small { image-rendering: pixelated; }
.label { font-weight: 600; overflow-wrap: anywhere; }
.confidence { float: right; font-variant-numeric: tabular-nums; }
.bar { height: 5px; margin: .35rem 0; border-radius: 3px; background: var(--line); overflow: hidden; clear: both; }
.bar i { display: block; height: 100%; background: var(--class); }
.second, .file { color: var(--faint); font-size: .82rem; overflow-wrap: anywhere; }
"""


def labelling_page(labelling: Labelling, title: str) -> str:
    """The page: the support set by class, then every image with its label, confidence and second choice."""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(labelling.support)}
    counts = Counter(image.label for image in labelling.images)
    classes = "\n".join(
        f'<section class="class" style="--class: {colours[name]}"><h3>{escape(name)}</h3>'
        f"<div>{''.join(_image(path) for path in files)}</div><p>{_images(counts[name])} labelled so</p></section>"
        for name, files in labelling.support.items()
    )
    images = "\n".join(_figure(image, colours[image.label]) for image in labelling.images)
    inverted = " Light and dark were exchanged to match the training data." if labelling.inverted else ""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{_images(len(labelling.images))} in {len(labelling.support)} classes</h1>
<p>Labelled by {escape(title)}.{inverted}</p>
<h2>What it was shown</h2>
<div class="classes">
{classes}
</div>
<h2>What it says</h2>
<div class="images">
{images}
</div>
</html>
"""


def _figure(image: LabelledImage, colour: str) -> str:
    percent = 100 * image.confidence
    return (
        f'<figure style="--class: {colour}">{_image(image.path)}<figcaption>'
        f'<span class="confidence">{percent:.0f} %</span><span class="label">{escape(image.label)}</span>'
        f'<div class="bar"><i style="width: {percent:.1f}%"></i></div>'
        f'<div class="second">else {escape(image.second)}, {100 * image.second_confidence:.0f} %</div>'
        f'<div class="file">{escape(shown_name(image.path))}</div></figcaption></figure>'
    )


def _image(path: Path) -> str:
    """An img element that carries its picture."""
    picture = Image.fromarray(read_image(path, colour=True))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG", optimize=True)
    source = base64.b64encode(encoded.getvalue()).decode("ascii")
    name = escape(shown_name(path))
    small = ' class="small"' if max(picture.size) < THUMBNAIL // 2 else ""
    return f'<img{small} src="data:image/png;base64,{source}" alt="{name}" title="{name}">'


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"
