"""Ids of experiments, written down once by the code of commit 9fdca78: no change may move anybody's results."""

import json
from pathlib import Path

import pytest

from cram_bench.experiment import Experiment
from cram_bench.recipes import imagenet_resnet50, recipe

ROWS = json.loads((Path(__file__).parent / "ids.json").read_text(encoding="utf-8"))
MAKE = {
    "recipe": recipe,
    "imagenet-resnet50": imagenet_resnet50,
    "settings": lambda **settings: Experiment.of(settings),
}


def test_there_are_several_hundred():
    assert len(ROWS) > 900
    assert len({row["id"] for row in ROWS}) > 850


@pytest.mark.parametrize("how", MAKE)
def test_every_recipe_keeps_its_id(how):
    moved = [row for row in ROWS if row["how"] == how and MAKE[how](**row["with"]).id != row["id"]]
    assert not moved, moved[:3]


def test_settings_written_whole_and_read_back_keep_the_id():
    for row in ROWS:
        experiment = MAKE[row["how"]](**row["with"])
        assert Experiment.of(json.loads(json.dumps(experiment.settings()))).id == row["id"]
