"""Notebooks name themselves: what they ask and train is in their metadata, and their parameters are in one cell."""

import json
import shutil
import subprocess
import sys

import nbformat
import pytest
from test_bad_input import check_line

from cram_bench import cli, report
from cram_bench.report.notebook import KINDS, RESERVED, Notebook, Parameter, find
from cram_bench.report.plan import plan

KERNEL = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}


def written(path, source='dataset: str = "digits"  # where to learn', plan=None, cells=1, kernel=KERNEL):
    """Write a notebook with a parameters cell and a plan."""
    plan = {"question": "Why?", "experiments": "recipes.grid"} if plan is None else plan
    tagged = [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}) for _ in range(cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=tagged, metadata={"cram_bench": plan, **kernel}), path)
    return Notebook.open(path)


def test_what_papermill_reads_is_what_the_notebook_checks_by_itself():
    for path in report.notebooks_folder().glob("*.ipynb"):
        notebook = Notebook.open(path)
        assert notebook.question
        (cell,) = (c for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", []))
        namespace = {}
        exec(source := "".join(cell["source"]), namespace)
        assert list(notebook.parameters) == list(namespace["__annotations__"])
        for name, parameter in notebook.parameters.items():
            assert KINDS[parameter.kind] == namespace["__annotations__"][name]
            assert parameter.default == namespace[name]
            assert parameter.meaning
        report.check_parameters(namespace | {"In": ["", source]})
        with pytest.raises(NameError, match="'epcohs'; did you mean 'epochs'"):
            report.check_parameters(namespace | {"epcohs": 1, "In": ["", source, "# Parameters\nepcohs = 1"]})
        with pytest.raises(TypeError, match="parameter epochs must be int like its default 0, not True"):
            report.check_parameters(namespace | {"epochs": True, "In": ["", source]})


def test_a_new_notebook_is_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cram_bench.runs.training.fit", lambda *a, **k: pytest.fail("trained"))
    own = report.find()["language"]
    content = json.loads(own.path.read_text())
    content["metadata"]["cram_bench"] = {
        "question": "Mine?",
        "experiments": "recipes.anatomy",
        "order": 1,
        "usual": True,
    }
    (tmp_path / "mine.ipynb").write_text(json.dumps(content))
    shutil.copy(own.path, tmp_path)
    (tmp_path / "draft.ipynb").write_text(
        json.dumps(content | {"metadata": {}})
    )  # says nothing of itself: is in no report
    assert list(find(tmp_path)) == ["mine", "language"]
    with pytest.raises(ValueError, match="unknown notebook 'draft' \\(allowed: mine, language\\)"):
        report.build(questions=["draft"], notebooks=tmp_path, reports=tmp_path)
    with pytest.raises(ValueError, match="unknown method 'sdg'"):  # by its own function, asked for by its own folder
        report.build("digits", parameters={"methods": ["sgd", "sdg"]}, notebooks=tmp_path, reports=tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    told = capsys.readouterr().out
    for notebook in find().values():
        assert f"{notebook.name}: {notebook.question}" in told
        assert all(p.meaning in told for p in notebook.parameters.values() if p.name not in RESERVED)


@pytest.mark.parametrize(
    ("source", "plan", "error", "words"),
    [
        ("dataset = 'digits'", None, TypeError, ("n.ipynb", "dataset", "annotated", "list[float]")),
        ("rates: tuple = (1,)", None, TypeError, ("rates", "annotated", "not tuple")),
        ("name: str = 'a=b'", None, ValueError, ("papermill does not read name", "'='")),
        ("epochs: int = 3  # 0 = usual", None, ValueError, ("papermill does not read epochs", "'='")),
        ("epochs: int = round(2.5)", None, ValueError, ("only assign literals",)),
        ("epochs: int = 3\nprint(epochs)", None, ValueError, ("only assign literals",)),
        ("", {"qestion": "Why?"}, ValueError, ("'qestion'", "did you mean 'question'")),
        ("", {"order": "first"}, TypeError, ("n.ipynb: ", "metadata.cram_bench.order", "int", "'first'")),
        ("", {"experiments": "recipes.nothing"}, ValueError, ("n.ipynb", "no function 'recipes.nothing'")),
        ("", {"experiments": "os.getcwd"}, ValueError, ("no function 'os.getcwd'",)),
    ],
)
def test_a_wrong_notebook_is_refused_in_a_line(source, plan, error, words, tmp_path):
    with pytest.raises(error) as caught:
        notebook = written(tmp_path / "n.ipynb", source, plan)
        _ = notebook.parameters, notebook.planner
    check_line(str(caught.value), words)


def test_a_notebook_has_one_parameters_cell_and_a_file_is_a_notebook(tmp_path):
    for cells in (0, 2):
        with pytest.raises(ValueError, match=f"exactly one cell tagged 'parameters', and has {cells}"):
            _ = written(tmp_path / "n.ipynb", cells=cells).parameters
    with pytest.raises(ValueError, match=r"n.ipynb: No kernel name"):
        _ = written(tmp_path / "n.ipynb", kernel={}).parameters
    (tmp_path / "n.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="is not readable as a notebook"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("kind", "default", "right", "wrong"),
    [
        ("int", 3, [1, 3], [True, 1.0, "3", None, [3]]),
        ("float", 0.5, [1, 0.5], [True, "1", None]),
        ("bool", False, [True], [0, "true"]),
        ("str", "", ["", "a"], [1, None, b"a"]),
        ("list[float]", [0.5], [[1, 0.5]], [[], (0.5,), [True], ["a"], 0.5, {"a": 1}]),
        ("list[str]", [], [[], ["a"]], ["a", [1], [["a"]]]),
    ],
)
def test_a_type_is_what_it_says(kind, default, right, wrong):
    parameter = Parameter("p", kind, default)
    for value in right:
        parameter.check_type(value)
    for value in wrong:
        with pytest.raises(TypeError) as caught:
            parameter.check_type(value)
        check_line(str(caught.value), (f"parameter p must be {kind} like its default {default!r}, not {value!r}",))


def test_a_notebook_that_was_made_a_script_checks_itself(tmp_path):
    script = tmp_path / "script.py"
    for value, status in (("3", 0), ("'3'", 1)):
        script.write_text(f"epochs: int = {value}\nimport cram_bench as cb\ncb.report.check_parameters(globals())\n")
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == "TypeError: parameter epochs must be int, not '3'"


@pytest.mark.parametrize("call", ["out.figure(f, {!r}, 'alt')", "out.table(t, {!r})", "out.measured({!r}, measure)"])
@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "..", ".hidden", "a\\\\b", ""])
def test_a_notebook_writes_into_its_report_alone(name, call, tmp_path):
    """A report names its files by paths in it, and a build removes those that it makes anew."""
    written(tmp_path / "mine.ipynb")
    content = json.loads((tmp_path / "mine.ipynb").read_text())
    content["cells"].append(nbformat.v4.new_code_cell(call.format(name)))
    (tmp_path / "mine.ipynb").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"mine.ipynb: the name of a figure or table must be that of one file, "
    ) as caught:
        report.build("digits", questions=["mine"], notebooks=tmp_path, reports=tmp_path / "reports")
    assert str(caught.value).endswith(f"not {name!r}")
    content["cells"][-1]["source"] = "%matplotlib inline"
    (tmp_path / "mine.ipynb").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"mine.ipynb is not Python: invalid syntax"):
        report.build("digits", questions=["mine"], notebooks=tmp_path, reports=tmp_path / "reports")


@pytest.mark.parametrize("name", [name for name, notebook in find().items() if notebook.experiments])
def test_every_notebook_that_trains_can_be_asked_for_float32(name):
    """On a processor without bfloat16 the usual precision takes ten times as long."""
    dataset = "sst2" if name == "language" else "cifar10"
    for asked, precisions in (("float32", {"float32"}), ("", {"bfloat16"})):
        found = plan(dataset, "full", None, {"precision": asked}, [name])
        assert {each.precision for each in found.wanted} == precisions
