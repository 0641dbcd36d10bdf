"""The templates of the pages, and a notebook as a page in the house style. Imports no torch, pandas or Jinja."""

from __future__ import annotations

import functools
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cram_bench.files import write

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

OURS = '<meta name="generator" content="cram_bench">'
"""A mark that every page carries."""
_HERE = Path(__file__).parent


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {}  # in the order that it is given in
    templates.filters["words"] = lambda name: name.replace("_", " ")
    templates.filters["fact"] = fact
    templates.globals["ours"] = Markup(OURS)
    templates.globals["asset"] = lambda name: Markup((_HERE / "assets" / name).read_text(encoding="utf-8").rstrip())
    return templates


def render(template: str, **values: Any) -> Markup:
    """Return a template of ``templates/`` with these values in it: a text is escaped, a ``Markup`` is not."""
    from markupsafe import Markup

    return Markup(_environment().get_template(template).render(values))


def plain(markup: str) -> str:
    """Return the text of a fact of ``report.json``."""
    return html.unescape(re.sub(r"</?code>", "", markup))


def fact(markup: str) -> Markup:
    """Return a fact of ``report.json`` as markup, escaped whoever wrote it: a text, which may be code as a whole.

    >>> fact("<code>a &amp; <b>b</b></code>")
    Markup('<code>a &amp; &lt;b&gt;b&lt;/b&gt;</code>')
    """
    from markupsafe import Markup, escape

    text = escape(plain(markup))
    return Markup(f"<code>{text}</code>") if markup.startswith("<code>") else text


def export(notebook: Path) -> None:
    """Write an executed notebook as a page beside it."""
    from markupsafe import Markup
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    body, _ = exporter.from_filename(str(notebook))
    page = render("notebook.html", title=notebook.stem.replace("_", " "), body=Markup(body))
    write(notebook.with_suffix(".html"), page)
