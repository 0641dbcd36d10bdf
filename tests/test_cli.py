import re
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import save_file

import cram_bench as cb
from cram_bench import cli


def run(capsys, *arguments: str) -> tuple[int, list[str], str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_train_prints_the_folder_last_and_finds_it_again(capsys, tmp_path):
    arguments = ("train", "--dataset", "digits", "--method", "cram+-multi", "--epochs", "1", "--seed", "3")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    folder = out[-1]
    assert (pd.read_csv(f"{folder}/history.csv")["epoch"] == [1]).all()
    status, out, err = run(capsys, *arguments)
    assert (status, out[-1], err) == (0, folder, "")
    status, out, _ = run(capsys, "runs", "--csv")
    assert status == 0
    assert out[1].split(",")[:7] == [
        folder.rpartition("/")[2],
        "digits",
        "convnet",
        "cram+-multi",
        "3",
        "1",
        "finished",
    ]
    status, out, _ = run(capsys, "probe", folder, "--sample", "100", "--out", str(tmp_path / "out"))
    assert status == 0
    assert {path.stem for path in (tmp_path / "out" / "tables").iterdir()} == {
        "sparsity_curve", "cram_gap", "sam_sharpness", "loss_in_ball", "layer_blame", "curvature",
    }  # fmt: skip


def test_somebody_elses_weights_are_probed(capsys, tmp_path):
    model = cb.models.create("convnet", 10, 1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    status, out, _ = run(capsys, "probe", file, "--arch", "convnet", "--data", "digits", "--sample", "50")
    assert status == 0
    assert "sparsity_curve" in out
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert f"prunable: {weights:,} weights in 4 tensors; dense: no other matrix" in out
    for arguments, message in (
        (["probe", file], "needs --arch"),
        (["probe", file, "--arch", "resnet20", "--data", "digits"], "does not fit resnet20"),
        (["probe", file, "--arch", "convet", "--data", "digits"], "did you mean 'convnet'"),
        (["probe", "0123", "--arch", "convnet"], "belong to a safetensors file"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "sdg"], "unknown method 'sdg'; did you mean 'sgd'"),
        (["train", "--dataset", "cifr10"], "unknown data set"),
        (["train", "--epochs", "0"], "epochs must be from 1 to 1000000, not 0"),
        (["train", "-s", "lr", "fast"], "lr must be of type float, not 'fast'"),
        (["train", "-s", "lr", "[1"], "'[1', is not YAML"),
        (["train", "-s", "lr", "1", "-s", "lr", "2"], "lr is given twice"),
        (["train", "-s", "seed", "3"], "seed is given as --seed, not with -s"),
        (["report", "-p", "output", "x"], "output is no free parameter"),
        (["train", "-s", "learning_rate", "1"], "unknown setting 'learning_rate'"),
        (["train", "-s", "batch_size", "100000", "--epochs", "1"], "larger than the training data"),
        (["probe", "nowhere"], "0 finished runs"),
        (["report", "-p", "epcohs", "3"], "unknown parameter 'epcohs'; did you mean 'epochs'"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, [])
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("0.9", 0.9),
        ("-2", -2),
        ("[2:4, 4:8]", ["2:4", "4:8"]),
        ("true", True),
        ("[.5]", [0.5]),
        ("x", "x"),
    ],
)
def test_values_are_read_as_one_expects(text, value):
    read = cli._values([["name", text]])["name"]
    assert (read, type(read)) == (value, type(value))


def test_the_help_lists_every_notebook_of_a_report(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    words = re.findall(r"\w+", capsys.readouterr().out)
    assert set(cb.report.NOTEBOOKS) <= set(words)


def test_help_loads_nothing_heavy():
    code = "import sys, cram_bench.cli as c; c._parser().format_help(); sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_of_images_trains_with_no_code_change(capsys, tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        for label, colour in (("day", 220), ("night", 30)):
            folder = tmp_path / "sky" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), (colour, colour - index, colour)).save(folder / f"{index}.png")
    status, out, err = run(
        capsys,
        "train",
        "--dataset",
        str(tmp_path / "sky"),
        "--epochs",
        "1",
        "-s",
        "batch_size",
        "8",
        "-s",
        "model",
        "convnet",
    )
    assert status == 0, err
    assert (pd.read_csv(f"{out[-1]}/history.csv")["test_accuracy"].between(0, 1)).all()
