"""Which rules keep the stationary covariance of the weights and of their moving average, on a noisy quadratic.

    python -m benchmarks.science.large_batch.noisy_quadratic          (closed forms, and Adam simulated: half an hour)
    python -m benchmarks.science.large_batch.noisy_quadratic --only SGD

A weight w with the gradient h (w - c) + noise of variance 1/B, and its average e with momentum ρ. At κ times the batch
the rules change the optimizer, at equal samples unless a row says otherwise. A cell is the largest relative deviation
of Var w, Cov(w, e), Var e, and of the mean of w where weight decay moves it, from the reference run's. SGD is exact:
the solution of a discrete Lyapunov equation. Adam is simulated by torch's own, many chains side by side, to about 1 %.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measurements import add_json, write_rows
from lightning_gap.regime import OptimizerRules, ema_momentum

RATIOS = (1, 2, 4, 8, 16, 32, 64)
# What is asked of a right rule.
TOLERANCE = 0.03
SGD = {"lr": 5e-4, "momentum": 0.0}
MOMENTUM = {"lr": 5e-5, "momentum": 0.9}
ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-12, "weight_decay": 0.0}
ADAMW = ADAM | {"weight_decay": 1.0}
# Of the average of the weights, and where the loss has its minimum, of AdamW alone.
RHO, CENTRE = 0.9995, 0.02


@dataclass(frozen=True)
class Case:
    """An optimizer, and what follows the batch."""

    optimizer: str
    group: Mapping[str, Any]
    rules: OptimizerRules
    label: str
    ema: bool = True  # whether the average's momentum follows
    equal_samples: bool = True


CASES = (
    Case("SGD", SGD, OptimizerRules("linear"), "linear"),
    Case("SGD", SGD, OptimizerRules("linear"), "linear, average as it was", ema=False),
    Case("SGD", SGD, OptimizerRules("sqrt"), "sqrt"),
    Case("SGD", SGD, OptimizerRules("sqrt"), "sqrt, equal updates", equal_samples=False),
    Case("SGD", SGD, OptimizerRules("none"), "none"),
    Case("SGD", MOMENTUM, OptimizerRules("linear"), "momentum, linear"),
    Case("SGD", MOMENTUM, OptimizerRules("linear", momentum="half_life"), "momentum, linear, momentum by half-life"),
    Case("SGD", MOMENTUM, OptimizerRules("sqrt"), "momentum, sqrt"),
    Case("Adam", ADAM, OptimizerRules("sqrt"), "sqrt"),
    Case("Adam", ADAM, OptimizerRules("sqrt", betas="half_life"), "sqrt, half-life"),
    Case("Adam", ADAM, OptimizerRules("adam"), "adam"),
    Case("Adam", ADAM, OptimizerRules("linear"), "linear"),
    Case("Adam", ADAM, OptimizerRules("none"), "none"),
    Case("AdamW", ADAMW, OptimizerRules("sqrt", "timescale", "half_life"), "sqrt, time scale, half-life"),
    Case("AdamW", ADAMW, OptimizerRules("sqrt", "timescale"), "sqrt, time scale"),
    Case("AdamW", ADAMW, OptimizerRules("sqrt", betas="half_life"), "sqrt, half-life, decay as it was"),
)


def covariance(group: Mapping[str, Any], rho: float, variance: float, curvature: float = 1.0) -> Tensor:
    r"""Return the stationary covariance of a weight and its average under SGD with momentum, exactly.

    With the state :math:`x = (w, m, e)`, :math:`m' = \mu m + h w + \xi`, :math:`w' = w - \eta m'`,
    :math:`e' = \rho e + (1 - \rho) w'`, it solves :math:`\Sigma = A \Sigma A^T + b b^T`.
    """
    lr, momentum = group["lr"], group["momentum"]
    weight = [1 - lr * curvature, -lr * momentum, 0.0]
    rows = [weight, [curvature, momentum, 0.0], [(1 - rho) * weight[0], (1 - rho) * weight[1], rho]]
    a = torch.tensor(rows, dtype=torch.float64)
    b = variance**0.5 * torch.tensor([-lr, 1.0, -(1 - rho) * lr], dtype=torch.float64)
    system = torch.eye(9, dtype=torch.float64) - torch.kron(a, a)
    solved = torch.linalg.solve(system, torch.outer(b, b).flatten()).reshape(3, 3)
    return solved[[0, 2]][:, [0, 2]]


def simulated(
    optimizer: str, group: Mapping[str, Any], rho: float, variance: float, *, chains: int, seed: int
) -> tuple[Tensor, float]:
    """Return the stationary covariance of a weight and its average under torch's Adam or AdamW, and the mean weight."""
    draws = torch.Generator().manual_seed(seed)
    rate = group["lr"] * (variance**-0.5 + group["weight_decay"])  # of the decay of the weights' correlation
    centre = CENTRE * bool(group["weight_decay"])
    mean = centre * variance**-0.5 * group["lr"] / rate
    start = torch.randn(chains, generator=draws, dtype=torch.float64) * (group["lr"] ** 2 / (2 * rate)) ** 0.5
    weight = (mean + start).requires_grad_()
    average = weight.detach().clone()
    made = getattr(torch.optim, optimizer)([weight], **group)
    settled, between = int(2 / rate), int(1 / rate)
    moments, updates = [], 0
    while len(moments) < 5:
        noise = torch.randn(chains, generator=draws, dtype=torch.float64)
        weight.grad = weight.detach() - centre + variance**0.5 * noise
        made.step()
        average.lerp_(weight.detach(), 1 - rho)
        updates += 1
        if updates >= settled and (updates - settled) % between == 0:
            both = torch.stack([weight.detach(), average])
            moments.append((torch.cov(both), both[0].mean()))
    return torch.stack([each for each, _ in moments]).mean(0), float(torch.stack([each for _, each in moments]).mean())


def deviations(case: Case, ratios: tuple[int, ...] = RATIOS, *, chains: int = 20_000) -> dict[int, float | None]:
    """Return by how much each ratio differs from the reference run; ``None`` where a rule refuses it."""
    found: dict[int, float | None] = {}
    reference: list[Tensor] = []
    for ratio in ratios:
        same = case.equal_samples
        try:
            group = {**case.group, **case.rules.at(case.optimizer, case.group, ratio, equal_samples=same)}
        except ValueError:
            found[ratio] = None
            continue
        rho = ema_momentum(RHO, ratio) if case.ema and same else RHO
        if case.optimizer == "SGD":
            moments = [covariance(group, rho, 1 / ratio).flatten()]
        else:
            spread, mean = simulated(case.optimizer, group, rho, 1 / ratio, chains=chains, seed=ratio)
            moments = [spread.flatten(), *([torch.tensor([mean])] if group["weight_decay"] else [])]
        all_of_them = torch.cat([each.double() for each in moments])
        reference = reference or [all_of_them]
        found[ratio] = float((all_of_them / reference[0] - 1).abs().max())
    return found


def main() -> None:
    """Print a line for each case: the deviation at each ratio, and up to which it stays within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="SGD, Adam or AdamW")
    parser.add_argument("--chains", type=int, default=20_000)
    parser.add_argument("--ratios", type=int, nargs="+", default=list(RATIOS))
    add_json(parser)
    options = parser.parse_args()
    ratios = (1, *(ratio for ratio in options.ratios if ratio != 1))
    print(f"{'':48}" + "".join(f"{f'κ = {ratio}':>9}" for ratio in ratios[1:]) + f"  within {TOLERANCE:.0%} up to")
    rows = []
    for case in CASES:
        if options.only not in ("", case.optimizer):
            continue
        found = deviations(case, ratios, chains=options.chains)
        within = 1
        for ratio in ratios:
            if (found[ratio] or 0.0) > TOLERANCE or found[ratio] is None:
                break
            within = ratio
        told = ["refused" if found[ratio] is None else f"{found[ratio]:.1%}" for ratio in ratios[1:]]
        print(
            f"{case.optimizer + ': ' + case.label:48}" + "".join(f"{each:>9}" for each in told) + f"  {within:>6}",
            flush=True,
        )
        row = {"optimizer": case.optimizer, "rule": case.label, "within": within}
        rows.append(row | {f"κ = {ratio}": each for ratio, each in zip(ratios[1:], told, strict=True)})
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
