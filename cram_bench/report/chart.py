"""Charts as part of a page: the drawing library once, and a specification each."""

from __future__ import annotations

import base64
import functools
import gzip
from typing import TYPE_CHECKING, Any

from cram_bench.checks import needs
from cram_bench.report.page import render

if TYPE_CHECKING:
    from markupsafe import Markup


@functools.cache
def library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, gzip-compressed, in base64: 0.4 MB of a page."""
    needs("charts", "report", "vl_convert")
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def markup(chart: Any, alt: str) -> Markup:
    """Return a chart as markup, whole in itself: it needs no network.

    Args:
        chart: of `cram_bench.charts`.
        alt: what it shows, for readers who do not see it.
    """
    return render("chart.html", spec=chart.to_dict(), alt=alt, library=library())
