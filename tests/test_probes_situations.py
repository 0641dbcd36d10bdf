"""Other people's loaders and models: the same examples at every evaluation, any outputs and losses, or one line."""

import copy
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import cram_bench as cb
from cram_bench.probes import common


def network(hidden=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, 3))


X = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (60,), generator=torch.Generator().manual_seed(2))
DATA = [(X[:40], Y[:40]), (X[40:], Y[40:])]


class Noisy(torch.utils.data.Dataset):
    """Another input at every reading, as an augmentation gives."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return X[index] + torch.randn(5), Y[index]


PROBES = {
    "sparsity_curve": lambda m, d, **k: cb.probes.sparsity_curve(m, d, ["global@0.5"], calibration=[(X,)], **k),
    "cram_gap": lambda m, d, **k: cb.probes.cram_gap(m, d, ["global@0.5"], 0.3, [(X,)], **k),
    "sam_sharpness": lambda m, d, **k: cb.probes.sam_sharpness(m, d, [0.1], **k),
    "sharpness_over_radii": lambda m, d, **k: cb.probes.sharpness_over_radii(m, d, [0.1], 2, 2, **k),
    "loss_in_ball": lambda m, d, **k: cb.probes.loss_in_ball(m, d, points=3, directions=2, **k),
    "loss_in_plane": lambda m, d, **k: cb.probes.loss_in_plane(m, d, points=2, **k),
    "loss_along_compression": lambda m, d, **k: cb.probes.loss_along_compression(m, d, "global@0.5", points=3, **k),
    "loss_along_compressions": lambda m, d, **k: cb.probes.loss_along_compressions(m, d, ["global@0.5"], 2, **k),
    "loss_along_path": lambda m, d, **k: cb.probes.loss_along_path(m, copy.deepcopy(m), d, points=2, **k),
    "layer_blame": lambda m, d, **k: cb.probes.layer_blame(m, d, "global@0.5", **k),
    "layer_sensitivity": lambda m, d, **k: cb.probes.layer_sensitivity(m, d, [0.0, 0.5], **k),
    "layer_sensitivity, tuned": lambda m, d, **k: cb.probes.layer_sensitivity(m, d, [0.5], [(X,)], **k),
    "stability": lambda m, d, **k: cb.probes.stability(m, d, "global@0.5", [(X,)], **k),
    "curvature": lambda m, d, **k: cb.probes.curvature(m, d, vectors=2, parts=2, **k),
    "gauss-newton": lambda m, d, **k: cb.probes.curvature(m, d, 1, "gauss-newton", vectors=2, parts=2, **k),
    "spectral_density": lambda m, d, **k: cb.probes.spectral_density(
        m, d, points=8, lanczos=4, repeats=1, parts=2, **k
    ),
}
GRADIENTS = {
    "cram_gap",
    "stability",
    "sam_sharpness",
    "sharpness_over_radii",
    "curvature",
    "gauss-newton",
    "spectral_density",
}


def loader(shuffled=True, noisy=True, drop_last=True):
    data = Noisy() if noisy else TensorDataset(X, Y)
    return DataLoader(data, batch_size=25, shuffle=shuffled, drop_last=drop_last)


def read_once(batches):
    """The batches that a probe will read next of a loader, whose order comes from torch's generator, left alone."""
    with torch.random.fork_rng():
        return list(batches)


@pytest.mark.parametrize("name", PROBES)
def test_a_loader_that_shuffles_augments_and_drops_is_one_sample(name):
    model, batches = network(), loader()
    torch.manual_seed(5)
    expected = PROBES[name](model, read_once(batches))
    state = torch.get_rng_state()
    pd.testing.assert_frame_equal(PROBES[name](model, batches), expected)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_flips_where_nothing_is_compressed_and_the_loader_shuffles():
    with pytest.warns(UserWarning, match="index is the place in one reading.*shuffle=False"):
        assert cb.probes.flips(network(), loader(), "global@0").empty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cb.probes.flips(network(), loader(shuffled=False, noisy=False, drop_last=False), "global@0.9")
    pd.testing.assert_frame_equal(found, cb.probes.flips(network(), DATA, "global@0.9"))
    assert len(found)


def test_calibration_batches_are_one_sample_too():
    torch.manual_seed(3)
    curve = cb.probes.sparsity_curve(network(), DATA, ["global@0", "global@1e-9"], calibration=loader())
    tuned = curve[curve["calibrated"]]
    assert tuned["loss"].nunique() == 1  # nothing is pruned at either


def test_the_dense_model_is_one_row_whoever_asks_for_it():
    curve = cb.probes.sparsity_curve(network(), DATA, ["global@0.5", "global@0", cb.compress.Magnitude(0.0)])
    assert curve["sparsity"].tolist() == [0, 0.5]


def test_the_gap_of_a_pattern_that_leaves_layers_dense_says_what_it_reached():
    """Of 5 · 8 weights, which four does not divide, none goes, of 8 · 3 the half."""
    assert cb.probes.cram_gap(network(), DATA, ["2:4"])["sparsity"].tolist() == [0.1875]


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_what_stops_the_blame_ends_it_before_the_next_evaluation(loss):
    """Traced, and from the beginning."""
    calls = []

    def before():
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    model = network()
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(InterruptedError):
        cb.probes.layer_blame(model, DATA, "global@0.5", before=before, loss=loss)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    calls[:] = [1, 1]
    cb.probes.layer_blame(model, DATA, "global@0.5", before=before, loss=loss)
    assert len(calls) == 2 + 2 * (len(DATA) if loss is None else 1)


def test_one_output_has_a_loss_and_no_accuracy():
    model = nn.Sequential(nn.Linear(5, 1))
    table = cb.probes.sparsity_curve(
        model, [(X, Y % 2)], ["global@0"], loss=lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], y.float())
    )
    assert table["accuracy"].isna().all()
    expected = F.binary_cross_entropy_with_logits(model(X)[:, 0], (Y % 2).float()).item()
    assert table["loss"].tolist() == pytest.approx([expected], rel=1e-5)


def test_data_without_an_end_are_refused(monkeypatch):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield X[0], Y[0]

    monkeypatch.setattr(common, "_MOST", 2**20)
    with pytest.raises(ValueError, match=r"holds its batches in memory.*more than .* GiB: give fewer"):
        cb.probes.sam_sharpness(network(), DataLoader(Endless(), batch_size=20))
    for once in (iter(DATA), (batch for batch in DATA)):
        with pytest.raises(TypeError, match="read more than once"):
            cb.probes.sam_sharpness(network(), once)
    with pytest.raises(ValueError, match="single examples in a torch DataLoader"):
        cb.probes.sam_sharpness(network(), [(X[0], Y[0])])
    with pytest.raises(TypeError, match="single examples in a torch DataLoader"):
        cb.probes.sam_sharpness(network(), [(X[0], 1)])


@dataclass
class Output:
    logits: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, inner, form):
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, x):
        return self.form(self.inner(x))


FORMS = {
    "ModelOutput": lambda z: Output(z),
    "dict": lambda z: {"aux": None, "logits": z},
    "out": lambda z: {"out": z, "aux": z * 0},
    "tuple": lambda z: (z, None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PROBES)
def test_outputs_are_read_where_the_logits_are(name, form):
    model = network()
    found = PROBES[name](Wrapped(model, FORMS[form]), DATA)
    expected = PROBES[name](model, DATA)
    if "layer" in found:
        found["layer"] = found["layer"].str.removeprefix("inner.")
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", [*PROBES, "flips", "predictions"])
def test_forward_gives_outputs_where_they_are_not_found(name):
    model = Wrapped(network(), lambda z: {"odd": z})
    probe = PROBES.get(name) or {
        "flips": lambda m, d, **k: cb.probes.flips(m, d, "global@0.5", **k),
        "predictions": lambda m, d, **k: pd.DataFrame(list(map(np.asarray, cb.probes.predictions(m, d, **k)))),
    }[name]  # fmt: skip
    with pytest.raises(TypeError, match=r"returns dict of odd, in which no logits are found: give forward="):
        probe(model, DATA)
    found = probe(model, DATA, forward=lambda m, x: m(x)["odd"])
    expected = probe(network(), DATA)
    if "layer" in found:
        found["layer"] = found["layer"].str.removeprefix("inner.")
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", PROBES)
def test_a_loss_of_ones_own_is_what_is_measured(name):
    """Regression: float targets of their own shape, no accuracy; twice the loss is twice of everything."""
    targets = X[:, :3] * 0.5
    data = [(X[:40], targets[:40]), (X[40:], targets[40:])]
    one = PROBES[name](network(), data, loss=F.mse_loss)
    curve = cb.probes.sparsity_curve(network(), data, ["2:4"], loss=F.mse_loss)  # batches of 40 and of 20
    assert curve["loss"].iloc[0] == pytest.approx(float(F.mse_loss(network().eval()(X), targets).detach()), rel=1e-5)
    two = PROBES[name](network(), data, loss=lambda outputs, y: 2 * F.mse_loss(outputs, y))
    if name == "sam_sharpness":
        expected = float(F.mse_loss(network().eval()(X), targets).detach())
        assert one["loss"].iloc[0] == pytest.approx(expected, rel=1e-5)
    for column in {"loss", "rise", "sharpness", "pruning_gap", "value", "error"} & set(one) - {"density"}:
        if name != "spectral_density" and (name, column) not in {("cram_gap", "gap"), ("cram_gap", "ascent_gap")}:
            np.testing.assert_allclose(two[column], 2 * one[column], rtol=2e-2, atol=1e-5)
    assert "accuracy" not in one or one["accuracy"].isna().all()
    with pytest.raises(ValueError, match="loss must return one number, the mean over the examples"):
        PROBES[name](network(), data, loss=lambda outputs, y: (outputs - y).square())


def test_segmentation_is_probed_with_the_loss_of_its_pixels():
    torch.manual_seed(0)
    model = Wrapped(nn.Conv2d(1, 3, 3, padding=1), FORMS["out"])
    x, y = torch.randn(6, 1, 8, 8), torch.randint(3, (6, 8, 8))
    curve = cb.probes.sparsity_curve(model, [(x, y)], ["global@0.5"], loss=F.cross_entropy)
    assert curve["loss"].iloc[0] == pytest.approx(float(F.cross_entropy(model(x)["out"], y).detach()), rel=1e-6)
    assert curve["accuracy"].isna().all()
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(6,\)"):
        cb.probes.sparsity_curve(model, [(x, y)], ["global@0.5"])
    with pytest.raises(
        ValueError, match=r"logits of shape \(n, classes\), and have shape \(6, 3, 8, 8\): give forward="
    ):
        cb.probes.sparsity_curve(model, [(x, y[:, 0, 0])], ["global@0.5"])


def test_an_accuracy_stands_beside_a_loss_of_labels():
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    found = cb.probes.sparsity_curve(network(), DATA, ["global@0.5"], loss=smooth)
    plain = cb.probes.sparsity_curve(network(), DATA, ["global@0.5"])
    assert found["accuracy"].tolist() == pytest.approx(plain["accuracy"].tolist())
    assert found["loss"].iloc[0] == pytest.approx(float(smooth(network().eval()(X), Y).detach()), rel=1e-5)


def test_inputs_may_be_a_mapping_that_forward_spreads():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, one, two):
            return self.inner(one + two)

    data = [({"one": x / 2, "two": x / 2}, y) for x, y in DATA]
    for name in ("sam_sharpness", "curvature", "gauss-newton", "layer_blame"):
        found = PROBES[name](Sum(), data, forward=lambda m, x: m(**x))
        expected = PROBES[name](network(), DATA)
        columns = [c for c in found if c not in ("layer", "quantity")]
        np.testing.assert_allclose(found[columns], expected[columns], rtol=1e-4, atol=1e-6)
    tuned = cb.probes.sparsity_curve(Sum(), data, ["2:4"], calibration=data, forward=lambda m, x: m(**x))
    plain = cb.probes.sparsity_curve(network(), DATA, ["2:4"], calibration=DATA)
    np.testing.assert_allclose(tuned["loss"], plain["loss"], rtol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", PROBES)
def test_probes_within_no_grad_and_inference_mode(name, context):
    model, expected = network(), PROBES[name](network(), DATA)
    with context():
        pd.testing.assert_frame_equal(PROBES[name](model, [(x.clone(), y.clone()) for x, y in DATA]), expected)
    with torch.no_grad():
        assert common.Problem(network(), DATA).gradient()[1]
    with torch.inference_mode():
        inside = network()
    with pytest.raises(ValueError, match=r"0.weight of the model was made in inference_mode.*make it outside"):
        PROBES[name](inside, DATA)


@pytest.mark.parametrize("name", PROBES)
def test_defaults_of_type_and_device_change_nothing(name):
    expected = PROBES[name](network(), DATA)
    model = network()
    torch.set_default_dtype(torch.float64)
    try:
        pd.testing.assert_frame_equal(PROBES[name](model, DATA), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")  # a tensor that lands there cannot be read
    try:
        if "spectral" not in name:
            pd.testing.assert_frame_equal(PROBES[name](model, DATA), expected)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16, torch.bool])
@pytest.mark.parametrize("name", [*PROBES, "flips"])
def test_labels_of_any_integer_type(name, kind):
    probe = PROBES.get(name) or (lambda m, d: cb.probes.flips(m, d, "global@0.7"))
    labels = Y % 2
    found = probe(network(), [(X, labels.to(kind))])
    pd.testing.assert_frame_equal(found, probe(network(), [(X, labels)]))


@pytest.mark.parametrize("name", PROBES)
def test_lazy_models_say_what_is_missing(name):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"'0.weight' is not initialised yet: call the model on one batch before this"):
        PROBES[name](model, DATA)


@pytest.mark.parametrize("name", PROBES)
def test_models_of_another_type_take_the_data_in_theirs(name):
    PROBES[name](network().double(), DATA)
    half = network().bfloat16()
    if name in GRADIENTS:
        with pytest.raises(
            ValueError, match=r"float32 or float64, and 0.weight is bfloat16: .*deepcopy\(model\).float"
        ):
            PROBES[name](half, DATA)
    else:
        found = PROBES[name](half, DATA)
        np.testing.assert_allclose(
            found["loss"], PROBES[name](network(), DATA)["loss"], atol=0.1
        ) if "loss" in found else None


def test_curvature_needs_weights_of_one_type():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3).double())
    for name in ("curvature", "gauss-newton", "spectral_density"):
        with pytest.raises(ValueError, match="weights of one type, and these are float32 and float64: probe a copy"):
            PROBES[name](model, DATA, forward=lambda m, x: m[1](m[0](x).double()))


class Counting(nn.Module):
    """Its outputs depend on how often it ran, and it has whole numbers for buffers: one in place, one put anew."""

    def __init__(self):
        super().__init__()
        self.inner = network()
        self.register_buffer("ran", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(3))
        self.noted = None

    def forward(self, x):
        self.ran += 1
        z = self.inner(x) * (1 + 0.1 * self.last)
        self.last = self.last + 1
        self.noted = x
        return z


@pytest.mark.parametrize("name", PROBES)
def test_buffers_that_the_forward_changes_are_put_back(name):
    model = Counting()
    held = model.last
    if name == "gauss-newton":
        with pytest.raises(ValueError, match="changes no buffer in place: take kind='hessian'"):
            PROBES[name](model, [(X, Y)])
        return
    first = PROBES[name](model, [(X, Y)])
    assert (int(model.ran), model.last.tolist()) == (0, [0, 0, 0])
    assert model.last is held
    pd.testing.assert_frame_equal(PROBES[name](model, [(X, Y)]), first)
    copy.deepcopy(model)  # nothing of a tracing is left in it
    if name == "layer_sensitivity":
        assert first["rise"].iloc[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_sparse_embeddings_have_dense_gradients_here(name):
    def bag(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))

    tokens = torch.randint(9, (12, 2), generator=torch.Generator().manual_seed(0))
    data = [(tokens, torch.arange(12) % 3)]
    probe = {"cram_gap": lambda m, d: cb.probes.cram_gap(m, d, ["global@0.5"], 0.3)}.get(name, PROBES[name])
    model = bag(True)
    pd.testing.assert_frame_equal(probe(model, data), probe(bag(False), data))
    assert model[0].sparse


def test_frozen_parameters_stand_still():
    """The Hessian, the ascent and the random directions are those of the network without them."""
    model = network()
    model[0].requires_grad_(False)
    head = nn.Sequential(copy.deepcopy(model[3]))
    features = [(model.eval()[:3](x).detach(), y) for x, y in DATA]
    for name in ("sam_sharpness", "sharpness_over_radii", "curvature"):
        model[1].requires_grad_(False)
        expected = PROBES[name](head, features)
        columns = [c for c in expected if c not in ("quantity", "kind")]
        np.testing.assert_allclose(PROBES[name](model, DATA)[columns], expected[columns], rtol=1e-3, atol=1e-6)


class Encoded(dict):
    """A mapping of a kind of its own, as tokenizers return it."""

    @property
    def ids(self):
        return self["ids"]


def test_a_mapping_that_already_fits_stays_of_its_kind():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(8, 3)

        def forward(self, inputs):
            return self.head(self.table(inputs.ids).flatten(1))

    tokens = torch.randint(9, (12, 2), generator=torch.Generator().manual_seed(0))
    data = [(Encoded(ids=tokens), torch.arange(12) % 3)]
    assert cb.probes.sparsity_curve(Reads(), data, ["global@0.5"])["loss"].notna().all()


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.mix = nn.Linear(6, 6)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embedding(x).mean(1))))


def test_tied_weights_are_probed_and_stay_tied():
    torch.manual_seed(0)
    model = TiedHead()
    data = [(torch.randint(7, (20, 3), generator=torch.Generator().manual_seed(0)), torch.arange(20) % 7)]
    before = copy.deepcopy(model.state_dict())
    for name, probe in PROBES.items():
        assert len(probe(model, data)), name
        assert model.head.weight is model.embedding.weight
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
    gap = cb.probes.cram_gap(model, data, ["global@0.5"], 0.2).iloc[0]
    other = copy.deepcopy(model)
    F.cross_entropy(other(data[0][0]), data[0][1]).backward()
    with torch.no_grad():
        for p in other.parameters():  # a tied weight moves once
            p += 0.2 * p.grad
        moved = float(F.cross_entropy(other(data[0][0]), data[0][1]))
    assert gap["ascent_gap"] == pytest.approx(moved - gap["loss"], abs=1e-5)


def test_a_model_that_detaches_has_no_gradient():
    model = Wrapped(network(), lambda z: z.detach())
    for name in GRADIENTS:
        with pytest.raises(ValueError, match="the loss has no gradient"):
            PROBES[name](model, DATA)


@pytest.mark.parametrize("option", ["forward", "loss"])
def test_what_cannot_be_called_is_refused(option):
    with pytest.raises(TypeError, match=f"{option} must be a function"):
        cb.probes.sam_sharpness(network(), DATA, **{option: "mse"})
