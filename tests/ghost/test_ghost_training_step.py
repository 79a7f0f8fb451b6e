"""A step leaves no trace in a module, whatever the module keeps and however it changes it."""

from collections import OrderedDict, deque

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_gap.ghost.training_step import leaving_no_trace, own_randomness, step_of


def snapshot(module):
    kept = {}
    for name, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            if isinstance(value, torch.Tensor):
                shown = value.tolist()
            elif key in ("_buffers", "_parameters", "_modules"):
                shown = {key: id(part) for key, part in value.items()}
            else:
                shown = repr(value)
            kept[name, key] = id(value), shown
    return kept


class Keeper(LightningModule):
    def __init__(self):
        super().__init__()
        self.norm, self.part = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.items, self.table, self.ordered = [1, [2]], {"a": 1}, OrderedDict(x=1, y=2)
        self.some, self.window, self.count, self.nothing = {1}, deque([1, 2], maxlen=2), 0, None
        self.tensor, self.leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
        with torch.inference_mode():
            self.old = torch.ones(2)


CHANGES = {
    "append": lambda m: m.items.append(3),
    "replace an item": lambda m: m.items.__setitem__(0, 9),
    "rebind a list": lambda m: setattr(m, "items", []),
    "new key": lambda m: m.table.update(b=2),
    "other value": lambda m: m.table.update(a=5),
    "pop": lambda m: m.table.pop("a"),
    "order": lambda m: m.ordered.popitem(last=False),
    "other order": lambda m: m.ordered.move_to_end("x"),
    "set": lambda m: m.some.add(2),
    "deque": lambda m: m.window.append(3),
    "count": lambda m: setattr(m, "count", m.count + 1),
    "something": lambda m: setattr(m, "nothing", 3),
    "new attribute": lambda m: setattr(m, "fresh", 3),
    "tensor in place": lambda m: m.tensor.add_(1),
    "tensor rebound": lambda m: setattr(m, "tensor", m.tensor + 1),
    "leaf": lambda m: m.leaf.data.add_(0) is None or m.leaf.detach().add_(1),
    "buffer in place": lambda m: m.queue.add_(1),
    "buffer rebound": lambda m: setattr(m, "queue", torch.ones(3)),
    "pointer": lambda m: m.pointer.add_(1),
    "of a part": lambda m: setattr(m.part, "calls", 1),
    "mode": lambda m: m.part.eval(),
    "log": lambda m: (m.log("loss", 1.0), m.log_dict({"loss": torch.ones(())})),
}


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_undone(name, error):
    module = Keeper()
    before, state = snapshot(module), {k: v.clone() for k, v in module.state_dict().items()}
    try:
        with leaving_no_trace(module, [module.norm]):
            CHANGES[name](module)
            module.norm(torch.ones(4, 3))
            if error:
                raise RuntimeError
    except RuntimeError:
        assert error
    assert snapshot(module) == before
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]) == (not key.startswith("norm.running") and "num_batches" not in key)


def test_random_numbers_go_on():
    before = torch.get_rng_state()
    with own_randomness(3):
        first = torch.rand(2)
    with own_randomness(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_with_and_without_a_number():
    class One(LightningModule):
        def training_step(self, batch):
            return batch

    class Two(LightningModule):
        def training_step(self, batch, index):
            return batch, index

    assert step_of(One())("batch", 3) == "batch"
    assert step_of(Two())("batch", 3) == ("batch", 3)
