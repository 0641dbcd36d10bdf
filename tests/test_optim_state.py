"""Copies and checkpoints of the optimizers: what another library, or a plain optimizer, makes of them."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import cram_bench as cb
from cram_bench.compress import Magnitude

LEVELS = [Magnitude(0.3), Magnitude(0.6), Magnitude(0.9)]
BUILD = {
    "sam": lambda m, b: cb.optim.SAM(m, b, rho=0.1),
    "asam": lambda m, b: cb.optim.SAM(m, b, rho=0.5, adaptive=True),
    "momentum-sam": lambda m, b: cb.optim.MomentumSAM(m, b),
    "cram+": lambda m, b: cb.optim.CrAM(m, b, LEVELS, seed=3),
    "cram+ held": lambda m, b: cb.optim.CrAM(m, b, LEVELS, mask_interval=3, seed=3),
    "cram+ plain": lambda m, b: cb.optim.CrAM(m, b, LEVELS, plain=0.5, seed=3),
    "cram-single": lambda m, b: cb.optim.CrAMSingle(m, b, LEVELS, seed=3),
    "cram-single gradient": lambda m, b: cb.optim.CrAMSingle(m, b, LEVELS, ascent="gradient", mask_interval=2, seed=3),
    "held": lambda m, b: cb.optim.HeldMasks(m, b, cb.compress.apply_(m, Magnitude(0.5))),
    "m-fac": lambda m, b: cb.optim.MFAC(m, b, 4, 1e-2, dtype=torch.float64),
    "s-m-fac": lambda m, b: cb.optim.EFCP(m, b, cb.optim.TopK(0.2), gradients=4, damping=1e-2, dtype=torch.float64),
    "cram+ over lowrank": lambda m, b: cb.optim.CrAM(
        m, cb.optim.EFCP(m, b, cb.optim.LowRank(1), gradients=4, damping=1e-2, dtype=torch.float64), LEVELS, seed=3
    ),
}
DRAWS = [kind for kind in BUILD if kind.startswith("cram") and "over" not in kind]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def train(model, optimizer, batch, steps):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(params=BUILD)
def begun(request, small_model, small_batch):
    """An optimizer after five steps, and how to build another."""
    optimizer = BUILD[request.param](small_model, sgd(small_model))
    train(small_model, optimizer, small_batch, 5)
    return small_model, optimizer, BUILD[request.param]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(copied, begun, small_batch):
    model, optimizer, _ = begun
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # puts a step of its own on the instance
    other, twin = copied((model, optimizer))
    assert twin.model is other
    assert twin.base is not optimizer.base
    before = copy.deepcopy(model.state_dict())
    train(other, twin, small_batch, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not equal(model, other)
    train(model, optimizer, small_batch, 3)
    assert equal(model, other)
    scheduler.step()
    assert twin.param_groups[0]["lr"] == 0.1


def test_hooks_stay_behind_in_a_copy(small_model, small_batch):
    optimizer, called = BUILD["cram+"](small_model, sgd(small_model)), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before") and None)
    optimizer.register_step_post_hook(lambda *_: called.append("after") and None)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        train(copied.model, copied, small_batch, 1)
    assert called == []
    train(small_model, optimizer, small_batch, 1)
    assert called == ["before", "after"]


def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own(begun, small_batch):
    model, optimizer, _ = begun
    twin = copy.deepcopy(optimizer)
    assert twin.model is not model
    assert twin.param_groups[0]["params"][0] is next(twin.model.parameters())
    train(twin.model, twin, small_batch, 3)
    train(model, optimizer, small_batch, 3)
    assert equal(model, twin.model)


def saved(value):
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("kind", BUILD)
def test_torch_distributed_checkpoint_resumes_bit_for_bit(kind, steps, small_model, small_batch):
    other = copy.deepcopy(small_model)
    optimizer = BUILD[kind](small_model, sgd(small_model))
    start = copy.deepcopy(small_model.state_dict())
    train(small_model, optimizer, small_batch, steps)
    weights, state = saved(get_state_dict(small_model, optimizer))
    if not steps:  # it has prepared the state with a step of its own, that moved nothing
        assert all(torch.equal(value, start[name]) for name, value in small_model.state_dict().items())
    twin = BUILD[kind](other, sgd(other))
    set_state_dict(other, twin, model_state_dict=weights, optim_state_dict=state)
    assert twin.param_groups[0]["lr"] == 0.1
    train(small_model, optimizer, small_batch, 4)
    train(other, twin, small_batch, 4)
    assert equal(small_model, other)


def test_torch_distributed_checkpoint_knows_parameters_by_name(small_model, small_batch):
    """The optimizer's state alone, over groups in another order."""
    parameters = list(small_model.parameters())
    base = torch.optim.SGD([{"params": parameters[:4], "rho": 0.3}, {"params": parameters[4:]}], lr=0.1, momentum=0.9)
    optimizer = cb.optim.SAM(small_model, base, rho=0.1)
    train(small_model, optimizer, small_batch, 2)
    state = saved(get_optimizer_state_dict(small_model, optimizer))
    assert state["param_groups"][0]["params"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    other = copy.deepcopy(small_model)
    theirs = list(other.parameters())
    base = torch.optim.SGD([{"params": theirs[:4]}, {"params": theirs[4:]}], lr=0.1, momentum=0.9)
    twin = cb.optim.SAM(other, base)
    set_optimizer_state_dict(other, twin, state)
    assert [group["rho"] for group in twin.param_groups] == [0.3, 0.1]
    assert torch.equal(twin.state[theirs[0]]["momentum_buffer"], optimizer.state[parameters[0]]["momentum_buffer"])


def test_a_step_without_closure_prepares_only_where_nothing_can_happen(small_model, small_batch):
    """Torch prepares a state at learning rate 0 with gradients 0; a forgotten closure in a warm-up from 0 is none."""
    optimizer = cb.optim.SAM(small_model, sgd(small_model))
    for parameter in small_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()  # the learning rate is not 0
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    small_model[3].bias.grad[0] = 1.0
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["sam", "asam", "momentum-sam", "held"])
def test_a_plain_checkpoint_brings_its_momentum_and_leaves_the_radius(kind, small_model, small_batch):
    base = sgd(small_model)
    closure = F.cross_entropy(small_model(small_batch[0]), small_batch[1])
    closure.backward()
    base.step()
    state = saved(base.state_dict())
    optimizer = BUILD[kind](small_model, sgd(small_model))
    optimizer.param_groups[0] |= {"rho": 0.7} if kind != "held" else {}
    optimizer.load_state_dict(state)
    if kind != "held":
        assert optimizer.param_groups[0]["rho"] == 0.7
        assert optimizer.param_groups[0].get("adaptive") == {"sam": False, "asam": True}.get(kind)
    for parameter, momentum in zip(small_model.parameters(), state["state"].values(), strict=True):
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum["momentum_buffer"])
    train(small_model, optimizer, small_batch, 2)


@pytest.mark.parametrize("kind", DRAWS)
def test_a_plain_checkpoint_is_loaded_into_the_base(kind, small_model, small_batch):
    base = sgd(small_model)
    optimizer = BUILD[kind](small_model, sgd(small_model))
    with pytest.raises(ValueError, match=r"no entry 'cram'.*optimizer\.base\.load_state_dict"):
        optimizer.load_state_dict(base.state_dict())
    optimizer.base.load_state_dict(base.state_dict())
    assert "rho" not in base.state_dict()["param_groups"][0]
    train(small_model, optimizer, small_batch, 2)
    assert optimizer.param_groups[0]["rho"] == optimizer.settings["rho"]


def test_a_plain_optimizer_goes_on_from_a_checkpoint_of_any(begun, small_batch):
    model, optimizer, _ = begun
    base = sgd(model)
    base.load_state_dict(saved(optimizer.state_dict()))
    parameter = next(model.parameters())
    assert torch.equal(base.state[parameter]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])
    F.cross_entropy(model(small_batch[0]), small_batch[1]).backward()
    base.step()


@pytest.mark.parametrize("kind", BUILD)
def test_a_group_that_the_base_adds_is_trained_like_the_others(kind, small_batch):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    other = copy.deepcopy(one)
    split = BUILD[kind](one, torch.optim.SGD(one[0].parameters(), lr=0.1, momentum=0.9))
    split.base.add_param_group({"params": list(one[2].parameters())})
    whole = BUILD[kind](other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    train(one, split, small_batch, 4)
    train(other, whole, small_batch, 4)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_group_that_the_base_adds_is_checked(small_model, small_batch):
    optimizer = cb.optim.SAM(small_model, torch.optim.SGD(small_model[0].parameters(), lr=0.1))
    optimizer.base.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="not in the model"):
        train(small_model, optimizer, small_batch, 1)
    del optimizer.param_groups[-1]
    optimizer.base.add_param_group({"params": list(small_model[3].parameters()), "rho": -1.0})
    with pytest.raises(ValueError, match="rho.*not -1"):
        train(small_model, optimizer, small_batch, 1)


@pytest.mark.parametrize("kind", DRAWS)
def test_a_state_that_does_not_fit_leaves_the_draw_as_it_was(kind, small_model, small_batch):
    optimizer = BUILD[kind](small_model, sgd(small_model))
    train(small_model, optimizer, small_batch, 3)
    state = saved(optimizer.state_dict())
    state["param_groups"].append(dict(state["param_groups"][0]))  # refused by torch, after the draw was loaded
    train(small_model, optimizer, small_batch, 1)
    before = optimizer.draw.generator.get_state(), list(optimizer.draw.uses)
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(state)
    assert torch.equal(optimizer.draw.generator.get_state(), before[0])
    assert optimizer.draw.uses == before[1]


@pytest.mark.parametrize("kind", ["sam", "momentum-sam", "cram+", "cram-single"])
def test_a_state_with_a_wrong_radius_is_refused_before_it_is_loaded(kind, small_model, small_batch):
    optimizer = BUILD[kind](small_model, sgd(small_model))
    train(small_model, optimizer, small_batch, 1)
    before, state = copy.deepcopy(optimizer.param_groups[0]["rho"]), saved(optimizer.state_dict())
    state["param_groups"][0] |= {"rho": -1.0, "lr": 7.0}
    with pytest.raises(ValueError, match="rho.*not -1"):
        optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (before, 0.1)


@pytest.mark.parametrize("kind", ["cram+ held", "cram-single gradient"])
def test_a_state_of_before_is_still_read(kind, small_model, small_batch):
    """The draw used to stand beside the groups."""
    optimizer = BUILD[kind](small_model, sgd(small_model))
    train(small_model, optimizer, small_batch, 3)
    state, other = saved(optimizer.state_dict()), copy.deepcopy(small_model)
    state["cram"] = state["param_groups"][0].pop("cram")
    twin = BUILD[kind](other, sgd(other))
    twin.load_state_dict(state)
    train(small_model, optimizer, small_batch, 3)
    train(other, twin, small_batch, 3)
    assert equal(small_model, other)


@pytest.mark.parametrize("kind", BUILD)
def test_what_is_no_state_is_refused(kind, small_model):
    optimizer = BUILD[kind](small_model, sgd(small_model))
    with pytest.raises(ValueError, match="no entry '(cram|state|preconditioner)'"):
        optimizer.load_state_dict(small_model.state_dict())


FORGETTING = {
    "momentum": (
        "cram+ held",
        lambda o: [s["momentum_buffer"].zero_() for s in o.state.values()],
    ),
    "the generator": ("cram+ held", lambda o: o.draw.generator.manual_seed(0)),
    "the masks": ("cram+ held", lambda o: o.draw.held.clear()),
    "the uses": ("cram+ held", lambda o: setattr(o.draw, "uses", [0] * 3)),
    "the last gradient": ("cram-single gradient", lambda o: o._last.clear()),
    "the radius": ("sam", lambda o: o.param_groups[0].update(rho=0.05)),
    "the kind of ascent": ("asam", lambda o: o.param_groups[0].update(adaptive=False)),
    "the learning rate": ("sam", lambda o: o.param_groups[0].update(lr=0.2)),
}


@pytest.mark.parametrize("piece", FORGETTING)
def test_every_piece_of_the_state_matters(piece, small_model, small_batch):
    """Resuming is bit for bit; each piece forgotten alone ends elsewhere, so the test of resuming can see it."""
    kind, forget = FORGETTING[piece]
    optimizer = BUILD[kind](small_model, sgd(small_model))
    train(small_model, optimizer, small_batch, 7)
    other = copy.deepcopy(small_model)
    third, forgetful = copy.deepcopy((small_model, optimizer))
    twin = BUILD[kind](other, sgd(other))
    twin.load_state_dict(saved(optimizer.state_dict()))
    forget(forgetful)
    for model, own in ((small_model, optimizer), (other, twin), (third, forgetful)):
        train(model, own, small_batch, 15)
    assert equal(small_model, other)
    assert not equal(small_model, third)


def test_a_resumed_optimizer_has_every_piece(small_model, small_batch):
    """Compared one by one, into an optimizer that was built with other settings and has been elsewhere."""
    optimizer = BUILD["cram+ held"](small_model, sgd(small_model))
    optimizer.param_groups[0] |= {"rho": 0.33, "lr": 0.07, "momentum": 0.8}
    train(small_model, optimizer, small_batch, 7)
    assert optimizer.draw.held, "no mask is held: the test could not fail"
    other = copy.deepcopy(small_model)
    twin = cb.optim.CrAM(other, torch.optim.SGD(other.parameters(), lr=1.0), LEVELS, 0.9, mask_interval=3, seed=8)
    train(other, twin, small_batch, 2)
    twin.load_state_dict(saved(optimizer.state_dict()))
    group = twin.param_groups[0]
    assert (group["rho"], group["lr"], group["momentum"]) == (0.33, 0.07, 0.8)
    assert "cram" not in group
    assert torch.equal(twin.draw.generator.get_state(), optimizer.draw.generator.get_state())
    assert twin.draw.uses == optimizer.draw.uses
    assert any(twin.draw.uses)
    assert twin.draw.held.keys() == optimizer.draw.held.keys()
    for index, masks in optimizer.draw.held.items():
        assert all(torch.equal(mask, twin.draw.held[index][name]) for name, mask in masks.items())
    for ours, theirs in zip(small_model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["momentum_buffer"], twin.state[theirs]["momentum_buffer"])
