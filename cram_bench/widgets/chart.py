"""A chart of `cram_bench.charts.explorer` as a widget: one can touch it, and it needs no network."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import anywidget
import traitlets

from cram_bench.charts.explorer import Rows


@functools.cache
def script() -> str:
    """Return Vega, Vega-Lite, Vega-Embed and what draws here as one module: 0.9 MB."""
    import vl_convert

    own = resources.files("cram_bench.widgets").joinpath("chart.js").read_text(encoding="utf-8")
    return vl_convert.javascript_bundle(own)


class Chart(anywidget.AnyWidget):
    """A specification over named data, the rows of each, and what was clicked at.

    altair's own JupyterChart draws everything anew when a number changes, and has no alternative text.

    Attributes:
        spec: of Vega-Lite; nothing is shown while it is empty.
        rows: name of the data → rows.
        alt: what is shown, for those who do not see it.
        picked: the layer that was clicked at, or is shown as if it were.
    """

    _css = """
    .cram-bench-chart { align-self: stretch; min-width: 0; color: var(--jp-ui-font-color1, currentColor); }
    .cram-bench-chart .vega-embed.has-actions { width: 100%; padding: 0; }
    .cram-bench-chart svg.marks { max-width: 100%; height: auto; }
    .cram-bench-chart .vega-embed details:not([open]) > .vega-actions { display: none; }
    .cram-bench-chart .vega-embed .vega-actions { top: 30px; }
    .cram-bench-chart .vega-embed .vega-actions a { color: #24292e; }
    """

    spec = traitlets.Dict().tag(sync=True)
    rows = traitlets.Dict().tag(sync=True)
    alt = traitlets.Unicode("").tag(sync=True)
    picked = traitlets.Unicode("").tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        type(self)._esm = script()
        super().__init__(**traits)

    def draw(self, spec: dict[str, Any], rows: Rows) -> None:
        """Show `rows`; the chart is made anew only where `spec` is another."""
        with self.hold_sync():
            self.rows, self.spec = rows, spec

    def clear(self) -> None:
        """Show nothing."""
        self.spec, self.rows = {}, {}
