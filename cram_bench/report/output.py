"""Where a notebook leaves its figures and tables."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cram_bench import runs, untrusted
from cram_bench.experiment import Experiment
from cram_bench.files import whole, write


class Output:
    """Where a notebook leaves its figures and tables; without a folder they are only shown.

    Args:
        folder: of the report, or empty.
        tables: a folder of tables that were measured before, or empty. With it nothing is trained or measured: `runs`
            is empty and `measured` reads, so that figures, texts and verdicts are made anew from the same numbers.
    """

    def __init__(self, folder: str | os.PathLike[str] = "", tables: str | os.PathLike[str] = "") -> None:
        self.folder = Path(folder) if folder else None
        self.tables = Path(tables) if tables else None

    def runs(self, experiments: Sequence[Experiment], store: runs.Store) -> list[runs.Run]:
        """Return the runs of the experiments, trained now or found finished; none where tables are given."""
        return [] if self.tables else runs.ensure_all(experiments, store)

    def measured(
        self, name: str, measure: Callable[..., pd.DataFrame], *arguments: Any, **options: Any
    ) -> pd.DataFrame:
        """Return ``measure(*arguments, **options)``, or the table of that name where tables are given; write it.

        Raises:
            FileNotFoundError: the folder of tables has no such table.
        """
        if self.tables is None:
            return self.table(measure(*arguments, **options), name)
        print(f"{name}: read from the table that was measured before; nothing is measured anew")  # noqa: T201
        # An id of digits and an e is no number.
        table = pd.read_csv(
            untrusted.table(self.tables / f"{name}.csv"), dtype=dict.fromkeys(("run", "id", "commit"), str)
        )
        return self.table(table, name)

    def figure(self, figure: Any, name: str, alt: str) -> Any:
        """Write ``figures/NAME.svg`` and ``.png``, and return the picture for the notebook to show.

        Args:
            figure: a matplotlib figure.
            name: of the files.
            alt: what the figure shows, for readers who do not see it.
        """
        from IPython.display import Image

        from cram_bench.plots import style

        with style():
            if self.folder is not None:
                folder = self.folder / "figures"
                folder.mkdir(parents=True, exist_ok=True)
                with whole(folder / f"{name}.svg") as part:
                    figure.savefig(part, format="svg", metadata={"Date": None, "Title": alt})
            picture = _png(figure, alt)
            if self.folder is not None:
                write(folder / f"{name}.png", picture)
        return Image(picture, width=int(figure.get_figwidth() * 110), alt=alt)

    def table(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write ``tables/NAME.csv``, and return the table for the notebook to show."""
        if self.folder is not None:
            folder = self.folder / "tables"
            folder.mkdir(parents=True, exist_ok=True)
            named_index = table.index.name is not None
            write(folder / f"{name}.csv", table.to_csv(index=named_index, float_format="%.8g"))
        return table


def _png(figure: Any, alt: str) -> bytes:
    """Return a figure as PNG, whose title is `alt`; as nothing of it is transparent, it has three channels."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn, small, title = io.BytesIO(), io.BytesIO(), PngInfo()
    figure.savefig(drawn, format="png")
    title.add_itxt("Title", alt)
    picture = Image.open(drawn)
    picture.convert("RGB").save(small, "PNG", optimize=True, pnginfo=title, dpi=picture.info["dpi"])
    return small.getvalue()
