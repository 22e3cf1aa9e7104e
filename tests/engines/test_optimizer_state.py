"""Optimizer state by name: what goes out comes back, and that of something else is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sft.engines.optimizer_state import OptimizerState, named, names_of

OTHER = r"resume with the model and the method that the checkpoint is of$"


def model(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2), nn.Linear(2, 2, bias=False))


def stepped(net, kind=torch.optim.AdamW, **options):
    """An optimizer of two groups, after two steps of different gradients."""
    first, *rest = net.parameters()
    groups = [{"params": [first], "lr": 0.5}, {"params": rest, "weight_decay": 0.25}]
    optimizer = kind(groups, lr=0.125, **options)
    for scale in (1.0, 2.0):
        for parameter in net.parameters():
            parameter.grad = scale * torch.ones_like(parameter)
        optimizer.step()
    return optimizer


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key


def test_what_is_gathered_comes_back_by_name() -> None:
    net, other = model(), model()
    optimizer, fresh = stepped(net), torch.optim.AdamW(other.parameters(), lr=9.0)
    tensors = OptimizerState(optimizer).gather(names_of(net))
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    assert tensors["group//0.weight//lr"] == 0.5 and tensors["group//1.weight//lr"] == 0.125
    assert tensors["state//1.weight//step"] == 2
    # in one group now, whose numbers are the last parameter's
    OptimizerState(fresh).scatter(names_of(other), tensors)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        same(fresh.state[theirs], optimizer.state[mine])
    group = fresh.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.25)
    assert group["amsgrad"] is False, "a number keeps its type"


def test_what_is_gathered_is_a_copy() -> None:
    net = model()
    optimizer = stepped(net)
    tensors = OptimizerState(optimizer).gather(names_of(net))
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    optimizer.step()
    same(tensors, before)
    OptimizerState(optimizer).scatter(names_of(net), tensors)
    optimizer.step()
    same(tensors, before)


def test_a_state_dict_by_name_is_what_would_be_gathered() -> None:
    net = model()
    optimizer = stepped(net)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    found = named(optimizer.state_dict(), [groups[0], [], groups[1]], names_of(net))
    same(found, OptimizerState(optimizer).gather(names_of(net)))


def test_names_leave_wrappers_out() -> None:
    net = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"a": nn.Linear(1, 1)})})
    net["_orig_mod"]["_checkpoint_wrapped_module"] = nn.Linear(1, 1, bias=False)
    assert set(names_of(net).values()) == {"a.weight", "a.bias", "weight"}


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "now"),
    [(torch.optim.SGD, torch.optim.AdamW), (torch.optim.AdamW, torch.optim.SGD)],
    ids=["SGD", "AdamW"],
)
def test_another_optimizer(saved, now) -> None:
    net = model()
    tensors = OptimizerState(stepped(net, saved)).gather(names_of(net))
    optimizer = now(net.parameters(), lr=1.0)
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: its optimizer has no '\w+', so it is another"
    ):
        OptimizerState(optimizer).scatter(names_of(net), tensors)
    assert not optimizer.state, "refused before anything is taken"


def test_another_model() -> None:
    net, wider = model(), nn.Sequential(*model(), nn.Linear(2, 2))
    optimizer = stepped(net)
    tensors = OptimizerState(optimizer).gather(names_of(net))
    other = torch.optim.AdamW(wider.parameters())
    with pytest.raises(ValueError, match=rf"^resume_from.* has no '2.weight'; {OTHER}"):
        OptimizerState(other).scatter(names_of(wider), tensors)
    groups = [list(wider.parameters())]
    with pytest.raises(
        ValueError, match=rf"^resume_from.* groups of \[1, 2\] parameters, the run's \[5\]; {OTHER}"
    ):
        named(optimizer.state_dict(), groups, names_of(wider))
