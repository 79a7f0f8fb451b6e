"""The large-batch regime in a loop of your own, without a Trainer: in plain torch, Lightning Fabric or accelerate.

    python examples/own_loop.py
    python examples/own_loop.py fabric
    python examples/own_loop.py accelerate

The images are scikit-learn's 1797 handwritten digits; the extra `data` brings them.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.regime import plan_regime


def train(model, loader, epochs, prepare, backward):
    """Train at the loader's batch by the regime of a reference run at the batch 16."""
    batch, samples = loader.batch_size, len(loader.dataset)
    plan = plan_regime(reference_batch_size=16, batch_size=batch, samples=samples, max_epochs=epochs)
    # The reference run, as you would write it: its learning rate, and a schedule as long as it is.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = CosineAnnealingLR(optimizer, T_max=plan.reference_updates)
    # This run: the rates are scaled, and the clock steps the schedule.
    clock = plan.apply(optimizer, schedule, interval="step")
    model, optimizer, loader = prepare(model, optimizer, loader)
    while not clock.over:
        for images, labels in loader:
            optimizer.zero_grad()
            backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
            clock.step()
            if clock.over:
                break
    return model


def tools(name: str) -> tuple[Callable[..., Any], Callable[[Tensor], Any]]:
    """Return what prepares a model, an optimizer and a loader, and what runs the backward pass."""
    if name == "fabric":
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=1)
        return lambda model, optimizer, loader: (
            *fabric.setup(model, optimizer),
            fabric.setup_dataloaders(loader),
        ), fabric.backward
    if name == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        return accelerator.prepare, accelerator.backward
    return lambda *parts: parts, Tensor.backward


def main(name: str = "torch") -> None:
    """Train at sixteen times the reference batch, and print what came of it."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    held_out = torch.arange(len(x)) % 5 == 0
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    data = TensorDataset(x[~held_out], y[~held_out])
    trained = train(model, DataLoader(data, 256, shuffle=True), 10, *tools(name))
    with torch.no_grad():
        right = (trained(x[held_out]).argmax(1) == y[held_out]).float().mean()
    print(f"accuracy after 10 epochs of the batch 16, at the batch 256: {float(right):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
