"""What the project says about itself agrees with itself."""

import doctest
import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
import torch

import cram_bench as cb
from cram_bench import _yaml

ROOT = Path(__file__).resolve().parent.parent


def test_environment_yml_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {requirement.lower() for group in groups for requirement in group}
    conda_names = {"torch": "pytorch", "matplotlib": "matplotlib-base", "playwright": "playwright-python"}
    wanted = {re.sub(r"^[a-z0-9-]+", lambda m: conda_names.get(m[0], m[0]), requirement) for requirement in wanted}
    environment = _yaml.load((ROOT / "environment.yml").read_text())
    items = environment["dependencies"]
    listed = {item for item in items if isinstance(item, str)} - {"pip"}
    listed |= {item for part in items if isinstance(part, dict) for item in part["pip"]} - {"-e ."}
    assert listed == wanted | {f"python{project['requires-python']}"}
    assert any("-e ." in part["pip"] for part in items if isinstance(part, dict))


def test_every_room_is_loaded_by_its_name():
    rooms = set(cb.__all__) - {"__version__"}
    assert {"progress", "callbacks", "curvature", "prune"} <= rooms
    for name in rooms:
        assert isinstance(cb.__getattr__(name), ModuleType)


def test_the_runs_beside_a_committed_report_are_not_ignored():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    path = "reports/cifar10-resnet20/runs/0/model.safetensors"
    assert subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", path], check=False).returncode == 1


def test_a_claim_is_shown_contradicted_or_neither_by_the_losses_of_its_report():
    module = claims_module()
    assert doctest.testmod(module).failed == 0
    table = pd.DataFrame(
        [
            ("cram+-multi", 0, "global", 0.0, False, 0.90),
            ("cram+-multi", 1, "global", 0.0, False, 0.92),
            ("cram+-multi", 0, "global", 0.0, True, 0.50),
            ("cram+-multi", 0, "global", 0.7, True, 0.89),
            ("cram+-multi", 1, "global", 0.7, True, 0.91),
            ("cram+-multi", 0, "global", 0.7, False, 0.10),
            ("cram+-multi", 0, "2:4", 0.4992, True, 0.88),
            ("sgd", 0, "global", 0.7, True, 0.20),
        ],
        columns=["method", "seed", "pattern", "sparsity", "calibrated", "accuracy"],
    )
    assert module.own_losses(table, {0.7: 1.1}) == ("shown", "−1.0 at 70 % (allowed 1.1), 2 seeds")
    assert module.own_losses(table, {0.7: 0.6})[0] == "not shown"
    assert module.own_losses(table, {0.7: 0.4})[0] == "contradicted"
    assert module.own_losses(table, {0.5: 1.0}, "2:4") == ("contradicted", "−3.0 at 50 % (allowed 1), 2 seeds")
    with pytest.raises(ValueError, match="lacks a sparsity"):
        module.own_losses(table, {0.8: 1.0})
    moved = pd.DataFrame({"method": ["sgd", "cram+-multi"], "seed": 0, "sparsity": 0.7, "accuracy": [0.9, 0.93]})
    assert module.transfer(moved, {0.7: 0.5}) == ("shown", "+3.0 at 70 % (allowed 0.5), 1 seed")


def claims_module():
    spec = importlib.util.spec_from_file_location("claims", ROOT / "scripts" / "claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_committed_report_is_small():
    for report in (ROOT / "reports").glob("cifar10-*"):
        files = [
            path for path in report.rglob("*") if path.is_file() and "runs" not in path.relative_to(report).parts[:1]
        ]
        assert sum(path.stat().st_size for path in files) < 6e6


def test_numbers_measured_anew_are_found_by_run_and_sparsity():
    """In any order, and runs without weights count as not measured."""
    spec = importlib.util.spec_from_file_location("recompute", ROOT / "scripts" / "recompute.py")
    recompute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recompute)
    rows = [("sgd", 0, 0.0, 0.9), ("sgd", 0, 0.9, 0.5), ("sgd", 1, 0.0, 0.8), ("sam", 0, 0.0, 0.7)]
    old = pd.DataFrame(rows, columns=["method", "seed", "sparsity", "accuracy"])
    new = old.iloc[[3, 1, 0]].assign(accuracy=[0.7, 0.25, 0.9])
    found = recompute.differences(old, new)
    assert list(found["there"]) == [True, True, False, True]
    assert list((found["accuracy"] - found["accuracy_new"])[found["there"]]) == [0, 0.25, 0]


@pytest.mark.parametrize(("given", "threads"), [([], 1), (["--threads", "2"], 2)])
def test_numbers_are_measured_anew_on_as_many_threads_as_are_asked_for(given, threads, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("recompute", ROOT / "scripts" / "recompute.py")
    recompute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recompute)
    about = {"versions": {"torch": "1.0"}, "build": {"parameters": {}}}
    (tmp_path / "report.json").write_text(json.dumps(about))
    monkeypatch.setattr(recompute.output, "Output", recompute.output.Output)  # which it exchanges
    monkeypatch.setattr(recompute, "plan", lambda **_: SimpleNamespace(notebooks=[]))
    before = torch.get_num_threads()
    try:
        for arguments, said in ((given, "no such measured table: a"), (["--threads", "0"], "2")):
            monkeypatch.setattr("sys.argv", ["recompute.py", str(tmp_path), "a", *arguments])
            with pytest.raises(SystemExit, match=said):
                recompute.main()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr()
    assert said.out.endswith(f"now; threads: {threads}\n")
    assert said.err.endswith("--threads must be at least 1, not 0\n")
