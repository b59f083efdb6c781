"""The review page: every item with its picture, to accept, edit or drop, and every refusal with its reason.

One HTML file that loads nothing and sends nothing: decisions are saved as a file by the browser, and the same
annotation command takes them up. What a model said is shown as text, never as markup.
"""

from __future__ import annotations

import base64
import html
import io
import json
import string
from importlib import resources
from pathlib import Path

from unichar_jax.app.annotate.annotation import Annotation, shortfalls
from unichar_jax.app.annotate.asking import Collected, Item
from unichar_jax.app.annotate.kinds import KINDS
from unichar_jax.app.annotate.writing import Decisions
from unichar_jax.data.character import ImageFile
from unichar_jax.data.images import open_image
from unichar_jax.files import write_text

_SIDE = 256


def write_review(found: Annotation, decisions: Decisions, path: Path) -> Path:
    """Writes the page of an annotation, with the decisions made so far; before they are applied."""
    files = resources.files("unichar_jax.app.annotate").joinpath("sheet")
    read = lambda name: files.joinpath(name).read_text(encoding="utf-8")  # noqa: E731
    shown = {
        "character": found.character.name,
        "drop": sorted(decisions.drop),
        "edit": dict(decisions.edit),
        "values": {i.id: i.value for c in found.collected.values() for i in c.items},
    }
    short = "".join(f"<li>{html.escape(line)}</li>" for line in shortfalls(found.collected.values()))
    page = string.Template(read("page.html")).substitute(
        style=read("style.css"),
        script=read("review.js"),
        name=html.escape(found.character.name),
        count=len(shown["values"]),
        refused=sum(len(c.rejected) for c in found.collected.values()),
        shortfalls=f"<details open><summary>Less than wished for</summary><ul>{short}</ul></details>"
        if short
        else "",
        contents=_contents(found),
        sections="\n".join(_section(found, kind) for kind in KINDS),
        # "<" cannot end the script element that holds the data.
        data=json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c"),
    )
    write_text(path, page)
    return path


def _contents(found: Annotation) -> str:
    """Links to the sections: there are hundreds of items."""
    counts = {kind: len(found.items(kind)) for kind in KINDS}
    return " ".join(
        f'<a href="#{kind}">{html.escape(KINDS[kind].title)}&nbsp;<small>{count}</small></a>'
        for kind, count in counts.items()
        if count
    )


def _section(found: Annotation, kind: str) -> str:
    parts = [c for (k, _), c in found.collected.items() if k == kind and (c.items or c.rejected)]
    if not parts:
        return ""
    images = {i.id: i for i in found.character.images}
    held = {i.id for i in found.held_out}
    bodies = []
    for part in parts:
        image = images.get(part.part)
        picture = _figure(image, part.part in held) if image else ""
        items = "".join(map(_item, part.items)) + _refusals(part)
        bodies.append(f'<div class="part">{picture}<div class="items">{items}</div></div>')
    count = sum(len(p.items) for p in parts)
    title = html.escape(KINDS[kind].title)
    return f'<section id="{kind}"><h2>{title} <small>{count}</small></h2>{"".join(bodies)}</section>'


def _item(item: Item) -> str:
    """A form for one item; nested values are edited as JSON."""
    rows = []
    for key, value in item.value.items():
        nested = not isinstance(value, str)
        text = json.dumps(value, ensure_ascii=False) if nested else value
        name = f"{item.id}.{key}"
        rows.append(
            f'<label for="{html.escape(name)}">{html.escape(key.replace("_", " "))}</label>'
            f'<textarea id="{html.escape(name)}" data-key="{html.escape(key)}" data-nested="{int(nested)}" rows="1">'
            f"{html.escape(text)}</textarea>"
        )
    return (
        f'<fieldset data-id="{html.escape(item.id)}"><label class="keep"><input type="checkbox" checked> keep</label>'
        f"{''.join(rows)}</fieldset>"
    )


def _refusals(part: Collected) -> str:
    if not part.rejected:
        return ""
    lines = "".join(
        f"<li><b>{html.escape(r.reason)}</b> <code>{html.escape(r.said[:400])}</code></li>"
        for r in part.rejected
    )
    return f"<details><summary>{len(part.rejected)} refused</summary><ul>{lines}</ul></details>"


def _figure(image: ImageFile, held_out: bool) -> str:
    picture = open_image(image.path)
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    name = html.escape(f"{image.id}.png") + (" · held out" if held_out else "")
    size = f'width="{picture.width}" height="{picture.height}"'
    shown = f'<img src="data:image/jpeg;base64,{data}" {size} alt="{name}">'
    return f"<figure>{shown}<figcaption>{name}</figcaption></figure>"
