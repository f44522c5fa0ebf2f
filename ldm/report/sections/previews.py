"""Images made during the training: reconstructions, found images, samples."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from ldm.report.html import render
from ldm.report.run import Stage

SHOWN = 10
"""Largest number of images of one name, evenly spaced over the training."""

WIDEST = 1400
"""Width in pixels to which wider images are reduced."""

LARGEST = 200_000
"""Bytes of a file from which it is compressed with losses."""

LARGEST_ANIMATION = 4_000_000
"""Bytes of an animation from which it is left out."""

TITLES = {
    "reconstructions": "Reconstructions: validation images above what the VAE makes of them",
    "decoded": "Validation images above what the full and the tiny decoder make of their latents",
    "nearest": "Captions of the validation set with the images that they find",
    "samples": "Generated images, from fixed prompts and noise",
}
"""Headings by the name of the image; others have their name."""


def part(stage: Stage) -> Markup:
    """Return each kind of image over the steps; a script shows one at a time, chosen by a slider."""
    groups = []
    for name, files in stage.images.items():
        shown = [(step, uri) for step, path in evenly(files) if (uri := inlined(path)) is not None]
        if shown:
            groups.append((TITLES.get(name, name), shown))
    animations = [
        (path.stem, data_uri(path.read_bytes(), "image/gif"))
        for path in stage.animations
        if path.stat().st_size <= LARGEST_ANIMATION
    ]
    return render(_TEMPLATE, groups=groups, animations=animations) if groups or animations else Markup()


def evenly(files: list[tuple[int, Path]], count: int = SHOWN) -> list[tuple[int, Path]]:
    """Return at most ``count`` files, evenly spaced, with the first and the last."""
    if len(files) <= count:
        return files
    return [files[round(i * (len(files) - 1) / (count - 1))] for i in range(count)]


def inlined(path: Path) -> str | None:
    """Return an image file as a data URI, reduced if it is large; None if it cannot be read."""
    try:
        with Image.open(path) as file:
            if file.width <= WIDEST and path.stat().st_size <= LARGEST and file.format == "PNG":
                file.verify()
                return data_uri(path.read_bytes(), "image/png")
            image = file.convert("RGB")
        if image.width > WIDEST:
            image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=88)
        return data_uri(buffer.getvalue(), "image/webp")
    except (OSError, SyntaxError, ValueError):
        return None


def data_uri(content: bytes, media_type: str) -> str:
    """Return the content of a file as a URL."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


_TEMPLATE = """
{% for title, shown in groups %}
<div class="previews"><h4>{{ title }}</h4>
<div class="strip" tabindex="0" role="group" aria-label="{{ title }}">
{% for step, uri in shown %}<figure data-step="{{ step }}"><img src="{{ uri }}" alt="{{ title }}, step {{ step }}" loading="lazy">
<figcaption>step {{ "{:,}".format(step) }}</figcaption></figure>{% endfor %}
</div></div>
{% endfor %}
{% if animations %}<div class="previews"><h4>Animations</h4><div class="strip">
{% for name, uri in animations %}<figure><img src="{{ uri }}" alt="{{ name }}"><figcaption>{{ name }}</figcaption></figure>
{% endfor %}</div></div>{% endif %}
"""
