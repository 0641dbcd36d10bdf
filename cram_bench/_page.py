"""One page in the house style, and a notebook as such a page. Light to import: no torch, no pandas."""

from __future__ import annotations

import html
from pathlib import Path

from cram_bench._files import write

OURS = '<meta name="generator" content="cram_bench">'
"""A mark that every page carries."""


def text(value: str) -> str:
    """Escape for HTML."""
    return html.escape(value)


def page(title: str, body: str) -> str:
    """Return a whole page in the house style."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta name="viewport" content="width=device-width">{OURS}
<style>
:root {{ color-scheme: light; background: #fff }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100%; height: auto }} figure {{ margin: 1.5rem 0 }} figcaption {{ color: #555; font-size: .85rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; display: block; overflow-x: auto }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
pre {{ background: #f6f6f6; padding: .6rem .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4 }}
code {{ background: #f6f6f6; padding: .1rem .25rem }} pre code {{ padding: 0 }}
dt {{ font-weight: 600 }} dd {{ margin: 0 0 .4rem }}
.shelf {{ display: flex; flex-wrap: wrap; gap: 2rem }} .shelf section {{ flex: 1 1 26rem; min-width: 0 }}
.slider {{ border: 1px solid #ddd; border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0 }}
.slider input[type=range] {{ width: 100% }} .slider #chart {{ width: 100%; height: auto }}
.slider #chart text {{ font-size: 11px }} @media (max-width: 34rem) {{ .slider #chart text {{ font-size: 19px }} }}
.result {{ font-size: 1.1rem }} .remark {{ color: #555; border-left: 4px solid #ccc; padding-left: 1rem }}
.failed {{ border-left: 4px solid #D55E00; padding-left: 1rem }} .anchor-link {{ display: none }}
</style></head><body>
{body}
</body></html>
"""


def export(notebook: Path) -> None:
    """Write an executed notebook as a page beside it."""
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    body, _ = exporter.from_filename(str(notebook))
    title = notebook.stem.replace("_", " ")
    write(notebook.with_suffix(".html"), page(title, f'<p><a href="index.html">← report</a></p>\n{body}'))
