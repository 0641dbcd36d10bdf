"""ZipLM: removal of groups against joint solves, the programme against brute force, and networks for a speed-up."""

import copy
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cram_bench as cb
from cram_bench import deploy
from cram_bench.curvature.obs import NotDefinite
from cram_bench.models.resnet import ResNet
from cram_bench.models.vit import ViT
from cram_bench.prune.structured import (
    METHODS,
    OverBudget,
    mean_loss,
    programme,
    remove,
    search,
    structures,
    table,
    to_counts,
    uniform,
)
from cram_bench.prune.structured.programme import sensitivities, total
from cram_bench.prune.structured.removal import damped
from cram_bench.prune.structured.ziplm import latencies


def problem(size: int, units: int, outputs: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H, W and X of a layer whose inputs depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size * units, size * units, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(size * units, 200, generator=generator, dtype=torch.float64)
    return 2 / 200 * x @ x.T, torch.randn(outputs, size * units, generator=generator, dtype=torch.float64), x


def loss(matrix: torch.Tensor, change: torch.Tensor) -> float:
    return float((change @ matrix * change).sum()) / 2


def solved(matrix: torch.Tensor, weight: torch.Tensor, keep: list[int]) -> torch.Tensor:
    """The best weights on some columns, from the normal equations."""
    out = torch.zeros_like(weight)
    if keep:
        out[:, keep] = torch.linalg.solve(matrix[keep][:, keep], matrix[keep] @ weight.T).T
    return out


def of(kept: tuple[int, ...], size: int) -> list[int]:
    return [unit * size + at for unit in kept for at in range(size)]


@pytest.mark.parametrize(("size", "units"), [(1, 24), (3, 8), (9, 4)])
def test_saliency_is_the_true_increase_and_weights_are_the_joint_solve(size: int, units: int) -> None:
    """At every count, float64; every removal is the one that brute force finds to cost least."""
    matrix, weight, x = problem(size, units)
    full, _, shift = damped(matrix, 0.01)
    assert shift == pytest.approx(0.01 * float(matrix.diagonal().mean()))
    path = remove(matrix, weight, units, range(units + 1))
    assert sorted(path.order) == list(range(units))
    before = 0.0
    for count in range(units, -1, -1):
        kept = path.kept(count)
        exact = solved(full, weight, of(kept, size))
        now = loss(full, exact - weight)
        assert torch.allclose(path.weights[count], exact[:, of(kept, size)], rtol=1e-9, atol=1e-10)
        assert path.weights[count].shape == (5, count * size)
        if count < units:
            assert float(path.increments[units - count - 1]) == pytest.approx(now - before, rel=1e-7, abs=1e-9)
        error = ((exact - weight) @ x).norm() / (weight @ x).norm()
        assert path.priors[count] == pytest.approx(float(error), rel=1e-6, abs=1e-7)
        if count:
            costs = {
                unit: loss(full, solved(full, weight, of(tuple(u for u in kept if u != unit), size)) - weight)
                for unit in kept
            }
            assert min(costs, key=costs.__getitem__) == path.order[units - count]
        before = now
    assert path.priors[units] == 0.0
    assert path.priors[0] == pytest.approx(1.0)


def test_units_are_scored_anew_after_every_removal() -> None:
    """Of two columns that do the same, one goes at once and the other last: scored once, both would go first."""
    x = torch.randn(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.stack([x[0], x[0] + 1e-3 * x[1], x[1], x[2]])
    weight = torch.tensor([[2.0, 2.0, 1.0, 1.5]], dtype=torch.float64)
    path = remove(2 / 400 * x @ x.T, weight, 4, range(5), damping=1e-6)
    assert {path.order[0], path.order[3]} == {0, 1}
    assert path.weights[1].item() == pytest.approx(4.0, rel=0.2)  # what stays does the work of both


def test_a_unit_without_inputs_goes_first_and_at_no_cost() -> None:
    matrix, weight, _ = problem(2, 5)
    gone = [1, 4, 5]  # of unit 0 one column, of unit 2 both
    matrix[gone], matrix[:, gone] = 0.0, 0.0
    path = remove(matrix, weight, 5, [5, 4])
    assert path.order[0] == 2
    assert float(path.increments[0]) == 0.0
    assert path.priors[4] == 0.0
    assert torch.equal(path.weights[4], weight[:, of(path.kept(4), 2)])  # and what stays keeps its value
    assert torch.equal(path.weights[5], weight)
    shift = damped(matrix, 0.01)[2]
    assert shift == pytest.approx(0.01 * float(matrix.diagonal().sum()) / 7)


def test_the_order_of_units_does_not_matter_and_float32_is_enough() -> None:
    """Units in another order go in the same order; weights of another type come back in it."""
    matrix, weight, _ = problem(2, 12)
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    columns = of(tuple(turned), 2)
    path = remove(matrix, weight, 12, [6])
    again = remove(matrix[columns][:, columns], weight[:, columns], 12, [6])
    assert tuple(turned[unit] for unit in again.order) == path.order
    single = remove(matrix, weight.float(), 12, [6])
    assert single.weights[6].dtype == torch.float32
    assert single.order == path.order
    assert (single.weights[6] - path.weights[6]).abs().max() < 1e-5


def test_a_matrix_that_cannot_be_factored_is_refused() -> None:
    matrix = torch.ones(4, 4, dtype=torch.float64)
    with pytest.raises(NotDefinite):
        remove(matrix, torch.ones(2, 4), 4, [2], damping=1e-300)


layer = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        *(st.lists(st.integers(0, 30).map(float), min_size=count, max_size=count) for _ in range(2))
    )
)


@settings(max_examples=200, deadline=None)
@given(st.lists(layer, min_size=1, max_size=4), st.integers(1, 60), st.sampled_from([7, 60, 1000]))
def test_the_programme_is_brute_force(layers: list, budget: int, buckets: int) -> None:
    """With times rounded up to buckets: the same least cost, never over the budget, none only where there is none."""
    costs, times = [list(cost) for cost, _ in layers], [list(time) for _, time in layers]
    ticks = [[math.ceil(time * buckets / budget - 1e-9) for time in each] for each in times]
    fits = [
        choice
        for choice in itertools.product(*(range(len(cost)) for cost in costs))
        if sum(each[option] for each, option in zip(ticks, choice, strict=True)) <= buckets
    ]
    if not fits:
        with pytest.raises(OverBudget):
            programme(costs, times, budget, buckets)
        return
    found = programme(costs, times, budget, buckets)
    assert found in fits
    assert total(costs, found) == min(total(costs, choice) for choice in fits)
    assert total(times, found) <= budget * (1 + 1e-9)


def test_what_takes_no_time_costs_no_bucket() -> None:
    """A hundred layers in ten buckets: those that are dropped leave all time to the one that is not."""
    costs = [[0.0, 1.0]] * 99 + [[0.0, 1000.0]]
    times = [[1.0, 0.0]] * 99 + [[1.0, 0.0]]
    assert programme(costs, times, 1.0, buckets=10) == (1,) * 99 + (0,)
    assert programme([[0.0, 1.0]], [[1.0, 0.0]], 0.0) == (1,)
    with pytest.raises(OverBudget):
        programme([[0.0, 1.0]], [[1.0, 0.5]], 0.0)


def test_uniform_is_the_largest_fraction_that_fits() -> None:
    """Against all fractions; and a choice within the budget at its very edge."""
    fractions = [[1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 2 / 3, 1 / 3, 0.0]]
    times = [[4.0, 3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]]
    assert uniform(fractions, times, 7.0) == (0, 0)
    assert uniform(fractions, times, 6.9) == (1, 0)  # at 0.87 the nearest are 0.75 and 1
    assert uniform(fractions, times, 5.0) == (1, 1)
    assert uniform(fractions, times, 0.0) == (4, 3)
    with pytest.raises(OverBudget):
        uniform(fractions, [[1.0] * 5, [1.0] * 4], 1.5)


def test_the_search_begins_at_uniform_and_ends_no_worse() -> None:
    """Costs whose layers do not compare: the programme alone loses to uniform, the search finds what it hides."""
    fractions = [np.linspace(1, 0, 11)] * 4
    times = [np.linspace(1, 0, 11)] * 4
    scale, weight = [1e3, 1.0, 1.0, 1e-2], [1.0, 3.0, 1.0, 2.0]
    costs = [s * (1 - f) ** 2 for s, f in zip(scale, fractions, strict=True)]
    start = uniform(fractions, times, 2.0)
    assert start == (5, 5, 5, 5)

    def score(choice: tuple[int, ...]) -> float:
        return sum(w * (option / 10) ** 2 for w, option in zip(weight, choice, strict=True))

    factors = sensitivities(costs, times, start)
    assert programme([f * c for f, c in zip(factors, costs, strict=True)], times, 2.0) == start
    assert score(programme(costs, times, 2.0)) > score(start)
    best = min(score(choice) for choice in itertools.product(range(11), repeat=4) if total(times, choice) <= 2.0 + 1e-9)
    choice, least = search(costs, times, 2.0, start, score, trials=200)
    assert total(times, choice) <= 2.0 + 1e-9
    assert least == score(choice)
    assert best <= least <= best + 0.1 * (score(start) - best)
    assert search(costs, times, 2.0, start, score, trials=200) == (choice, least)  # the seed decides
    assert search(costs, times, 2.0, start, score, trials=0) == (start, score(start))
    asked: list[tuple[int, ...]] = []

    def worse(choice: tuple[int, ...]) -> float:
        asked.append(choice)
        return float(choice != start)

    assert search(costs, times, 2.0, start, worse, trials=50)[0] == start
    assert len(asked) == len(set(asked))  # no choice is scored twice
    assert search(costs, times, 2.0, start, lambda choice: math.nan if choice != start else 1.0)[0] == start


def images(count: int = 96) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images of three classes that differ in their mean colour."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    x = torch.randn(count, 3, 8, 8, generator=generator) + 2 * F.one_hot(labels, 3)[:, :, None, None]
    return [(x[:50], labels[:50]), (x[50:], labels[50:])]


def trained(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = ViT(3, image_size=8, dim=24, depth=2, heads=3) if kind == "vit" else ResNet((1, 2), 8, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for x, y in images():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def latency(model: nn.Module, fixed: float = 1.0) -> pd.DataFrame:
    """A table in which a unit of every structure takes as long as its share of 10 / structures."""
    found = structures(model)
    rows = [{"structure": "fixed", "kind": "fixed", "units": 0, "seconds": fixed}]
    rows += [
        {"structure": name, "kind": each.kind, "units": units, "seconds": 10 / len(found) * units / each.count}
        for name, each in found.items()
        for units in each.options
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_one_look_serves_several_speed_ups(kind: str) -> None:
    """Predictions keep to the table; the masked network is the shrunk one; the search is no worse than uniform."""
    model, batches = trained(kind), images()
    before, found = copy.deepcopy(model.state_dict()), structures(model)
    model.train()
    results = cb.prune.ziplm(
        model, batches, [1.5, 4], latency=latency(model), methods=METHODS, samples=64, held=32, trials=15
    )
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(each.method, each.speedup) for each in results] == [(m, s) for m in METHODS for s in (1.5, 4)]
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    for each in results:
        seconds = 1 + sum(10 / len(found) * len(units) / found[name].count for name, units in each.structure.items())
        assert each.predicted == pytest.approx(11 / seconds)
        assert each.predicted >= each.speedup * (1 - 1e-9)
        pruned = copy.deepcopy(model).eval()
        assert each.apply_(pruned) is each.masks
        small = deploy.shrink(pruned, each.structure)
        with torch.no_grad():
            logits = pruned(x)
            assert (small(x) - logits).abs().max() < 1e-5
        assert each.calibration_loss == pytest.approx(float(F.cross_entropy(logits[:64], y[:64])), rel=1e-4)
        assert each.loss == pytest.approx(float(F.cross_entropy(logits[64:], y[64:])), rel=1e-4)
        for name, mask in each.masks.items():
            assert not dict(pruned.named_parameters())[name][~mask].any()
        counted = sum(p.numel() for p in pruned.parameters() if p.ndim > 1)
        there = sum(p.numel() for p in small.parameters() if p.ndim > 1)
        assert each.masks.zeros == counted - there
    by = {(each.method, each.speedup): each for each in results}
    for speedup in (1.5, 4):
        assert by["ziplm", speedup].calibration_loss <= by["uniform", speedup].calibration_loss + 1e-9
        fractions = {len(units) / found[name].count for name, units in by["uniform", speedup].structure.items()}
        assert max(fractions) - min(fractions) <= 0.34  # three heads are thirds
    assert by["uniform", 1.5].calibration_loss < by["magnitude", 1.5].calibration_loss
    listed = table(results)
    assert listed["method"].tolist() == [each.method for each in results]
    assert listed["kept"].between(0, 1).all()


def test_counts_alone_give_what_a_clock_led_to() -> None:
    """The same units, weights and masks as `ziplm` makes of the same examples; the model stays as it was."""
    model, batches = trained("resnet"), images()
    (found,) = cb.prune.ziplm(model, batches, [1.5], latency=latency(model), methods=["uniform"], samples=64, held=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = to_counts(model, batches, found.counts, samples=64)
    assert again.structure == found.structure
    assert all(torch.allclose(value, found.weights[name], atol=1e-6) for name, value in again.weights.items())
    assert all(torch.equal(mask, found.masks[name]) for name, mask in again.masks.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert again.counts == found.counts
    assert again.loss == again.calibration_loss


def test_weights_are_those_of_the_inputs_that_were_looked_at() -> None:
    """Of one layer alone, against H from hooks and the joint solve; the same examples whatever the speed-ups."""
    model, batches = trained("vit"), images()
    seen: list[torch.Tensor] = []
    hook = model.layers[1].down.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(torch.cat([x for x, _ in batches])[:64])
    hook.remove()
    x = seen[0].double().T
    matrix = 2 / x.shape[1] * x @ x.T
    matrix += 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    (result,) = cb.prune.ziplm(model, batches, [2], latency=latency(model), methods=["uniform"], samples=64, held=32)
    weight = model.layers[1].down.weight.detach().double()
    kept = list(result.structure["layers.1.columns"])
    assert 0 < len(kept) < 96
    expected = solved(matrix, weight, kept)
    assert torch.allclose(result.weights["layers.1.down.weight"].double(), expected, rtol=1e-3, atol=1e-5)
    both = cb.prune.ziplm(model, batches, [3, 2], latency=latency(model), methods=["uniform"], samples=64, held=32)
    assert both[1].structure == result.structure


def test_what_is_held_out_decides_nothing() -> None:
    """Other held-out examples, or H collected in several passes: the same structure and weights, another loss."""
    model, (first, second) = trained("resnet"), images()
    x, y = torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
    options = {"latency": latency(model), "samples": 64, "held": 32, "trials": 15}
    (one,) = cb.prune.ziplm(model, [(x, y)], [2], **options)
    wrong = torch.cat([y[:64], (y[64:] + 1) % 3])
    (other,) = cb.prune.ziplm(model, [(torch.cat([x[:64], 3 * x[64:]]), wrong)], [2], memory=1e-9, **options)
    assert one.structure == other.structure
    assert one.calibration_loss == other.calibration_loss
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
    assert one.loss < other.loss


def test_magnitude_is_the_norm_of_all_weights_of_a_unit() -> None:
    """Rows of what leads to it and columns of what follows; nothing is corrected."""
    model = trained("resnet")
    (result,) = cb.prune.ziplm(model, images(), [2], latency=latency(model), methods=["magnitude"], samples=64, held=32)
    block = model.layer2[0]
    norms = block.conv1.weight.square().sum((1, 2, 3)) + block.conv2.weight.square().sum((0, 2, 3))
    kept = result.structure["layer2.0.channels"]
    assert sorted(norms.topk(len(kept)).indices.tolist()) == list(kept)
    expected = torch.zeros_like(block.conv2.weight)
    expected[:, list(kept)] = block.conv2.weight.detach()[:, list(kept)]
    assert torch.equal(result.weights["layer2.0.conv2.weight"], expected)


def test_gpt2_of_random_weights_is_pruned_by_a_loss_of_its_own() -> None:
    """Its layers are Conv1D, its labels the next tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=4, n_inner=48, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 20, (24, 8), generator=torch.Generator().manual_seed(0))
    batches = [(ids, torch.zeros(24, dtype=torch.long))]

    def forward(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return network(input_ids=x).logits, x

    def next_token(outputs: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        logits, x = outputs
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    results = cb.prune.ziplm(
        model, batches, [2], latency=latency(model), methods=METHODS, samples=16, held=8, trials=5,
        forward=forward, loss=next_token,
    )  # fmt: skip
    for each in results:
        pruned = copy.deepcopy(model)
        masks = each.apply_(pruned)
        assert masks["transformer.h.0.mlp.c_proj.weight"].shape == (48, 16)
        small = deploy.shrink(pruned, each.structure)
        with torch.no_grad():
            assert (small(ids).logits - pruned(ids).logits).abs().max() < 1e-5
            assert each.loss == pytest.approx(float(next_token((small(ids[16:]).logits, ids[16:]), ids)), rel=1e-4)


def test_wrong_arguments_are_refused_in_one_line() -> None:
    model, sound = ResNet((1,), 8, 3), latency(ResNet((1,), 8, 3))
    options = {"batches": images(), "speedups": [1.5], "latency": sound, "samples": 8, "held": 8}
    slow = sound.assign(seconds=sound["seconds"].where(sound["kind"] != "fixed", 100.0))
    for wrong, kind, words in [
        ({"speedups": [1.0]}, ValueError, "a speed-up must be above 1, not 1"),
        ({"speedups": [0.5]}, ValueError, "a speed-up must be"),
        ({"speedups": []}, ValueError, "is empty"),
        ({"speedups": 2.0}, TypeError, "speedups must be a list"),
        ({"speedups": ["2"]}, TypeError, "a speed-up must be a number, not '2'"),
        ({"methods": ["zipml"]}, ValueError, "did you mean 'ziplm'"),
        ({"samples": 0}, ValueError, "samples must be at least 1, not 0"),
        ({"held": 0}, ValueError, "held must be at least 1, not 0"),
        ({"samples": 90}, ValueError, r"samples \+ held=98 needs 98 examples, and there are 96"),
        ({"trials": -1}, ValueError, "trials must be at least 0, not -1"),
        ({"damping": 0.0}, ValueError, "damping must be above 0"),
        ({"memory": -1.0}, ValueError, "memory must be"),
        ({"speedups": [20]}, ValueError, r"a speed-up of 20 cannot be reached: 1e\+03 of 1.1e\+04 ms .* 11 at most"),
        ({"latency": slow}, ValueError, "cannot be reached"),
        ({"latency": sound.drop(columns="seconds")}, ValueError, "no column 'seconds'"),
        ({"latency": sound[sound["kind"] != "fixed"]}, ValueError, "no row of kind 'fixed': measure it"),
        ({"latency": sound[:-1]}, ValueError, "no row for 'layer1.0.channels' with 0 units: measure it"),
        ({"latency": sound.assign(seconds=math.nan)}, ValueError, "says nan seconds for 'fixed'"),
        ({"latency": sound.assign(seconds=-1.0)}, ValueError, "says -1.0 seconds for 'fixed'"),
        (
            {"latency": pd.concat([sound.assign(batch=1), sound.assign(batch=8)])},
            ValueError,
            r"2 settings of batch: choose one, such as table\[table.batch == 1\]",
        ),
        ({"latency": {}}, TypeError, "the table must be a DataFrame"),
        ({"batches": [(torch.zeros(16, 3, 8, 8), torch.zeros(16).long())]}, ValueError, ""),
        ({"batches": [(images()[0][0], torch.full((50,), 7))]}, ValueError, "labels must be from 0 to 2"),
    ]:
        if not words:
            nn.init.zeros_(model.layer1[0].bn1.bias)  # all that conv2 sees is zero
        with pytest.raises(kind, match=words or "all inputs of layer1.0.conv2 are zero") as error:
            cb.prune.ziplm(model, **(options | wrong))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no structures that are known"):
        cb.prune.ziplm(nn.Linear(3, 3), **options)
    (result,) = cb.prune.ziplm(model, **options)
    with pytest.raises(ValueError, match="fits no parameter of Linear"):
        result.apply_(nn.Linear(3, 3))


def test_padding_does_not_enter_and_losses_are_means_over_examples() -> None:
    """Batches of unequal size count by their examples."""
    model, batches = trained("resnet"), images(90)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with torch.no_grad():
        expected = float(F.cross_entropy(model(x), y))
        assert mean_loss(model, [(x[:20], y[:20]), (x[20:], y[20:])]) == pytest.approx(expected, rel=1e-5)


def test_a_table_is_read_by_names_whatever_the_order_of_its_rows() -> None:
    model = ResNet((1, 2), 8, 3)
    found, sound = structures(model), latency(model)
    assert latencies(sound.sample(frac=1.0, random_state=0), found) == latencies(sound, found)
    dense = pd.DataFrame([{"structure": "dense", "kind": "dense", "units": 0, "seconds": 99.0}])
    fixed, times = latencies(pd.concat([dense, sound]), found)
    assert fixed == 1.0
    assert [len(options) for options in times] == [len(each.options) for each in found.values()]
    assert times[1] == [10 / 3 * units / 16 for units in found["layer2.0.channels"].options]
