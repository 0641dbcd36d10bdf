"""What a report consists of: notebooks, parameters, experiments. All is checked here, before anything trains."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from cram_bench import prune, recipes
from cram_bench.checks import instance, integer, items, needs, unknown
from cram_bench.data import is_folder
from cram_bench.experiment import Experiment
from cram_bench.report import folders
from cram_bench.report.notebook import RESERVED, Notebook, find, outputs


@dataclass(frozen=True)
class Plan:
    """Which notebooks a report executes, with which parameters, and the experiments they need."""

    notebooks: list[Notebook]
    profile: str
    given: dict[str, Any]
    wanted: list[Experiment]
    name: str
    """Of the report's folder, where it is given none: dataset-model, and what is unusual about the rest."""

    @property
    def questions(self) -> list[str]:
        return [notebook.name for notebook in self.notebooks]

    @property
    def folders(self) -> dict[str, str]:
        """Paths of the image folders → the names that a report gives them."""
        return folders.named([each.data.dataset for each in self.wanted])

    def parameters(self, notebook: Notebook, **more: str) -> dict[str, Any]:
        """Return what is put into a notebook: of what was given, and of `more`, what it has."""
        return {name: value for name, value in (self.given | more).items() if name in notebook.parameters}


def plan(
    dataset: str | None = None,
    profile: str = "",
    seeds: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    questions: Sequence[str] | None = None,
    notebooks: str | os.PathLike[str] | None = None,
) -> Plan:
    """Check all that a report was asked for, as `cram_bench.report.build` says; nothing is trained or written."""
    instance("parameters", parameters, (Mapping, type(None)), "a mapping of names to values")
    if seeds is not None:
        integer("seeds", seeds, 1)
    if reserved := [name for name in RESERVED if name in (parameters or {})]:
        raise ValueError(f"{reserved[0]} is no free parameter: use --dataset, --seeds, --reports or CRAM_BENCH_RUNS")
    needs("reports", "report", "papermill", "nbconvert", "nbformat", "ipykernel")
    known = find(notebooks)
    usual = [name for name, notebook in known.items() if notebook.usual]
    chosen = _chosen(usual if questions is None else questions, known)
    for notebook in chosen:
        outputs(notebook.path)  # says which would lead out of the report
    dataset = chosen[0].parameters["dataset"].default if dataset is None else dataset
    profile = chosen[0].profile if profile == "" else profile
    given = _given(chosen, dataset, profile, seeds, parameters or {})
    wanted = list(dict.fromkeys(wanted for notebook in chosen for wanted in _experiments(notebook, given)))
    if "sparsities" in given or "patterns" in given:
        prune.grid(given.get("patterns", ["global"]), given.get("sparsities", [0.5]))
    title = re.sub(r"[:/\\]", "-", f"{Path(wanted[0].data.dataset).name}-{wanted[0].model}")
    asked = [notebook.name for notebook in chosen]
    unusual = [] if asked == usual else [name.replace("_", "-") for name in asked]
    name = "-".join([title, *(["quick"] if profile == "quick" else []), *unusual])
    return Plan(chosen, profile, given | {"dataset": wanted[0].data.dataset}, wanted, name)


def _chosen(questions: Sequence[str], known: Mapping[str, Notebook]) -> list[Notebook]:
    """Return the notebooks of these names."""
    questions = items("questions", questions, "names of notebooks") if questions else []
    for question in questions:
        if question not in known:
            raise ValueError(unknown("notebook", question, list(known)))
    if not questions:
        raise ValueError("a report needs at least one notebook")
    return [known[question] for question in dict.fromkeys(questions)]


def _given(
    chosen: Sequence[Notebook], dataset: str, profile: str, seeds: int | None, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is put into the notebooks: the profile's settings and the parameters, each checked."""
    allowed = {name: parameter for notebook in chosen for name, parameter in notebook.parameters.items()}
    given: dict[str, Any] = {"dataset": dataset}
    if seeds is not None or "seeds" in allowed:  # a notebook about one network has none
        given["seeds"] = seeds if seeds is not None else (3 if dataset == "digits" else 1)
    given |= recipes.profile_changes(dataset, profile) | dict(parameters)
    if is_folder(target := str(given.get("target", "digits"))):
        given["target"] = str(Path(target).expanduser().resolve())  # the notebook runs in another folder
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(unknown("parameter", name, list(allowed)))
        allowed[name].check_type(value)
        if name not in ("seeds", "epochs"):  # the experiments check those
            allowed[name].check_range(value)
    return given


def _experiments(notebook: Notebook, given: Mapping[str, Any]) -> Iterator[Experiment]:
    """Yield the experiments of a notebook."""
    values = {name: given.get(name, parameter.default) for name, parameter in notebook.parameters.items()}
    function = notebook.planner
    accepted = signature(function).parameters
    yield from _flat(function(**{name: value for name, value in values.items() if name in accepted}))


def _flat(planned: Any) -> Iterator[Experiment]:
    if isinstance(planned, Experiment):
        yield planned
    else:
        for part in planned.values() if isinstance(planned, Mapping) else planned:
            yield from _flat(part)
