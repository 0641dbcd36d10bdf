"""What MkDocs cannot do by itself: reports and files of the project in the site, and formulas without JavaScript."""

import html
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages that stand in the root of the project."""
COPIED = (".html", ".png", ".svg", ".csv", ".ipynb", ".json")
ROOMS = (
    "compress", "prune", "optim", "train", "callbacks", "losses", "schedules", "probes", "plots", "charts", "data",
    "models", "deploy", "curvature", "recipes", "experiment", "runs", "sweep", "widgets", "report", "distributed",
)  # fmt: skip
"""What the API has a page for."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Take in the pages of the root, and of every report that pages link to all but its weights."""
    for room in ROOMS:
        files.append(File.generated(config, f"api/{room}.md", content=listed(room)))
    for name in BESIDE:
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for report in sorted(linked()):
        for path in sorted((ROOT / "reports" / report).rglob("*")):
            place = path.relative_to(ROOT)
            if path.is_file() and path.suffix in COPIED and "runs" not in place.parts:
                files.append(File(place.as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def listed(room: str) -> str:
    """Return the page of a room: what it is, and all its public classes and functions."""
    module = importlib.import_module(f"cram_bench.{room}")
    public = getattr(module, "__all__", None) or [
        name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__
    ]
    things = [getattr(module, name) for name in public if not name.startswith("_")]
    text = [f"# cb.{room}", (module.__doc__ or "").partition("\n\n")[0]]
    for title, kind in (("Functions", inspect.isfunction), ("Classes", inspect.isclass)):
        own = sorted((thing for thing in things if kind(thing)), key=lambda thing: thing.__name__)
        text += [f"## {title}"] if own else []
        text += [f"::: {thing.__module__}.{thing.__qualname__}" for thing in own]
    return "\n\n".join(text)


def linked() -> set[str]:
    """Return the names of the reports that pages link to."""
    pages = (ROOT / "docs").rglob("*.md")
    return {name for page in pages for name in re.findall(r"\.\./reports/([\w-]+)/", page.read_text(encoding="utf-8"))}


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links that leave ``docs/`` for the root of the project to their places in the site, one folder nearer; a
    report's folder to its first page.
    """
    if page.file.src_uri in BESIDE:
        return markdown
    up = "../" * (page.file.src_uri.count("/") + 1)
    nearer = re.sub(rf"\]\({re.escape(up)}(reports/|{'|'.join(map(re.escape, BESIDE))})", rf"]({up[3:]}\1", markdown)
    return re.sub(r"(reports/[\w-]+/)\)", r"\1index.html)", nearer)


def on_page_content(html_: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw without a script."""

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline")

    return FORMULA.sub(formula, html_)


def on_post_build(config: Any) -> None:
    """Write the index of words as a script too: pages that are opened without a server look for that."""
    index = Path(config.site_dir) / "search" / "search_index.json"
    text = f"var __index = {index.read_text(encoding='utf-8')}"
    index.with_suffix(".js").write_text(text, encoding="utf-8")
