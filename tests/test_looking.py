import pytest
import torch

import cram_bench as cb
from cram_bench.optim.looking import CrAMLookingStep, Look
from cram_bench.recipes import recipe


def test_the_masks_are_the_pruners_and_are_asked_anew(monkeypatch):
    experiment = recipe("digits", "cram+-looking", epochs=4).but(
        **{"step.pruner": "greedy(gradients=16)", "step.every": 2}
    )
    train, _ = experiment.load_data()
    model = experiment.build_model(train)
    optimizer = experiment.build_optimizer(model)
    looked = []

    class Watch(cb.callbacks.Callback):
        def on_epoch(self, fit):
            looked.append((fit.epoch, {place: masks for place, masks in optimizer.draw.held.items()}))
            if fit.epoch == 2:
                expected = cb.prune.Greedy(gradients=16, seed=2).fit(model, train)
                for place, choice in enumerate(optimizer.draw.compressors):
                    for name, mask in expected.masks(choice.sparsity).items():
                        assert torch.equal(mask, optimizer.draw.held[place][name])

    callbacks = [*experiment.step.callbacks(train), Watch()]
    cb.train.fit(model, optimizer, train, epochs=4, batch_size=128, callbacks=callbacks)
    assert [sorted(held) for _, held in looked] == [[], *[list(range(8))] * 3]
    assert looked[1][1] == looked[2][1] == looked[3][1]  # held, and not asked after the last epoch


def test_a_step_with_held_masks_zeroes_what_the_pruner_drops():
    step = CrAMLookingStep(compressors=("global@0.9",), pruner="obd(gradients=16)")
    train, _ = cb.data.load("digits")
    model = cb.models.create("convnet", 10, 1, 8)
    optimizer = step.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), seed=0)
    look = next(callback for callback in step.callbacks(train) if isinstance(callback, Look))
    fit = cb.train.Fit(model, optimizer, None, epochs=5, steps_per_epoch=1, epoch=1)
    look.on_epoch(fit)
    masks = optimizer.draw.apply_()
    assert masks == look.held[0]
    assert cb.compress.sparsity(model) == pytest.approx(0.9, abs=1e-3)
    optimizer.draw.held.clear()
    Look(look.pruner, look.every, train).on_start(fit)  # a checkpoint is written before the look of its epoch
    assert {name: mask.tolist() for name, mask in optimizer.draw.held[0].items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }
    other = Look(look.pruner, look.every, train)
    other.load_state_dict(look.state_dict())
    assert {name: mask.tolist() for name, mask in other.held[0].items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"pruner": "greedy@0.9"}, "greedy@0.9"), ({"pruner": "gredy"}, "gredy"), ({"pruner": "greedy(blok=3)"}, "blok"),
     ({"every": 0}, "every"), ({"mask_interval": 20}, "mask_interval")],
)  # fmt: skip
def test_what_cannot_be_is_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        CrAMLookingStep(**settings)
    assert len(str(caught.value).splitlines()) == 1
