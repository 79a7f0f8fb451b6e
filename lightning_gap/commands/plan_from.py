"""``lightning-gap plan --from``: what other batches take to a target, by the trade-off read from runs' logs."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gap.commands.parsing import CommandError, Parser, at_least, between, numbers, positive
from lightning_gap.dashboards.runs import Run, RunError, read_runs
from lightning_gap.dashboards.table import Column, ResultTable, Row
from lightning_gap.dashboards.targets import HOLD, Target
from lightning_gap.dashboards.to_target import (
    ToTarget,
    changes_batch,
    learning_rate_of,
    setting_of,
    to_its_end,
    to_target,
)
from lightning_gap.regime.critical_batch import CriticalBatchFit, fit_critical_batch, trade_off_at
from lightning_gap.regime.rules import OPTIMIZERS, RULE_NAMES, ema_momentum
from lightning_gap.regime.rules.auto import AUTO, Choice, choose, rules_for
from lightning_gap.trainer.terminal import say

__all__ = ["duration", "parser", "run", "scaled"]

_NOISE = ("lightning_gap/regime/critical_batch_size", "lightning_gap/regime/noise_scale")


def parser() -> Parser:
    """Return the parser of the words behind ``plan``."""
    plan = Parser(
        prog="lightning-gap plan",
        description="Read runs, and print what batches take to a target: learning rate, weight decay, beta2, the decay "
        "of an average of the weights, updates, samples and time. Runs at several batches are fitted by the trade-off "
        "S = S_min + E_min / B (McCandlish et al. 2018); one run with a GradientNoiseScale fixes it alone.",
    )
    plan.add_argument(
        "--from", dest="runs", nargs="+", type=Path, required=True, metavar="RUN",
        help="the folder of a run, or a folder with runs in it at any depth",
    )  # fmt: skip
    plan.add_argument("--target", metavar="METRIC>=VALUE", help="or METRIC<=VALUE: what is to be reached, as "
                      "'val_acc>=0.9'; without it, where a single run ended")  # fmt: skip
    plan.add_argument("--hold", type=at_least(1), default=HOLD, metavar="N",
                      help=f"points in a row at the target (default: {HOLD})")  # fmt: skip
    plan.add_argument("--smooth", type=at_least(1), default=1, metavar="N",
                      help="the mean of the last N points counts, for noisy losses (default: 1)")  # fmt: skip
    plan.add_argument("--batch-size", type=at_least(1), metavar="N",
                      help="samples per update of all runs, where they do not tell")  # fmt: skip
    plan.add_argument("--multiples", type=numbers, metavar="K,K,...",
                      help="of the smallest batch (default: 1,2,4,... to four times the critical one)")  # fmt: skip
    plan.add_argument("--rule", choices=(*RULE_NAMES, AUTO), default="sqrt", help="how the rate follows the batch "
                      "(default: sqrt); auto chooses, by the optimizer and the critical batch")  # fmt: skip
    plan.add_argument("--optimizer", choices=tuple(OPTIMIZERS), metavar="CLASS", help="for --rule auto: the class of "
                      "the runs' optimizer, or the nearest that it derives from, as AdamW")  # fmt: skip
    of_run = plan.add_argument_group("what the run at the smallest batch had, where its logs do not tell")
    of_run.add_argument("--lr", type=positive, metavar="RATE", help="its highest learning rate")
    of_run.add_argument("--weight-decay", type=positive, metavar="DECAY", help="its weight decay")
    of_run.add_argument("--beta2", type=between(0, 1), metavar="BETA", help="Adam's second beta")
    of_run.add_argument("--ema", type=between(0, 1), metavar="DECAY", help="of the average of its weights, an update")
    return plan


def scaled(
    ratio: float,
    *,
    rule: str = "sqrt",
    factor: float | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    beta2: float | None = None,
    ema: float | None = None,
) -> dict[str, float]:
    r"""Return hyper-parameters of a batch :math:`\kappa` times as large.

    .. math:: \eta' = f(\kappa) \eta, \qquad \lambda' = \frac{\kappa}{f(\kappa)} \lambda, \qquad
        \beta_2' = \beta_2^\kappa, \qquad \rho' = \rho^\kappa

    so that the half-lives of weights, second moments and averages stay what they were in samples: the rules of
    :class:`~lightning_gap.regime.OptimizerRules`, and :func:`~lightning_gap.regime.ema_momentum`.

    Args:
        ratio: :math:`\kappa`.
        rule: Of the learning rate, for :func:`~lightning_gap.regime.lr_factor`.
        factor: :math:`f(\kappa)`, where it is known already. Default: what the rule says.
        lr: :math:`\eta`; what is None is left out.
        weight_decay: :math:`\lambda`, decoupled: multiplied by the rate.
        beta2: :math:`\beta_2`.
        ema: :math:`\rho`.

    Example:
        >>> scaled(4, lr=0.1, weight_decay=0.01, beta2=0.5)
        {'lr': 0.2, 'weight_decay': 0.02, 'beta2': 0.0625}
    """
    group: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    group |= {} if beta2 is None else {"betas": (0.0, beta2)}
    group |= rules_for(rule, "timescale", "half_life").rescaling(ratio, ratio, factor=factor).at("AdamW", group)
    group |= {"beta2": group.get("betas", (None, None))[1], "ema": None if ema is None else ema_momentum(ema, ratio)}
    return {name: group[name] for name in ("lr", "weight_decay", "beta2", "ema") if group[name] is not None}


@dataclass(frozen=True)
class _TradeOff:
    """The trade-off, the runs it comes from, and how, in words."""

    fit: CriticalBatchFit
    held: Sequence[ToTarget]
    source: str

    @property
    def base(self) -> ToTarget:
        """The first run of the smallest batch."""
        return min(self.held, key=_batch)


def run(words: Sequence[str]) -> None:
    """Print the plan of runs.

    Args:
        words: Those behind ``plan``.
    """
    options = parser().parse_args(words)
    if (options.rule == AUTO) != (options.optimizer is not None):
        raise CommandError(
            "--rule auto chooses by the optimizer: give --optimizer, as SGD or AdamW"
            if options.rule == AUTO
            else f"--optimizer is for --rule auto alone, and the rule is {options.rule}"
        )
    left_out: list[str] = []
    try:
        runs = read_runs(options.runs, left_out=left_out)
        target = None if options.target is None else Target.parse(options.target)
    except (RunError, ValueError) as error:
        raise CommandError(str(error)) from None
    left_out += [f"{run.name}: its batch changes, which no one batch stands for" for run in runs if changes_batch(run)]
    runs = [run for run in runs if not changes_batch(run)]
    if not runs:
        raise CommandError("the batch of every run changes: give runs of one batch each")
    measured = _measured(runs, target, options)
    trade_off = _trade_off(measured)
    said = [] if target is None else [_runs_table(measured).to_rich()]
    plan = _plan(trade_off, options)
    say(*said, trade_off.source, plan.to_rich(), *filter(None, [plan.caption]), *_notes(trade_off))
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)


def _measured(runs: Sequence[Run], target: Target | None, options: argparse.Namespace) -> list[ToTarget]:
    if target is None and len(runs) > 1:
        raise CommandError(f"{len(runs)} runs are compared by a target: give --target, as 'val_loss<=0.3'")
    if target is None:
        measured = [to_its_end(runs[0], batch=options.batch_size)]
    else:
        known = sorted({key for run in runs for key in run.metrics if not key.startswith("lightning_gap/")})
        if not any(target.metric in run.metrics for run in runs):
            raise CommandError(f"--target {target}: no run logged {target.metric}; logged are {', '.join(known[:12])}")
        given = {"hold": options.hold, "smooth": options.smooth, "batch": options.batch_size}
        measured = [to_target(run, target, **given) for run in runs]
    held = [each for each in measured if each.updates]
    if not held:
        short = "it" if len(runs) == 1 else "none of the runs"
        raise CommandError(
            f"--target {target}: {short} held it over {options.hold} points: "
            f"{', '.join(f'{each.run.name} {each.outcome}' for each in measured[:8])}. Give an easier target, or a "
            "smaller --hold"
            if target
            else f"{runs[0].name} logged nothing with its updates: give another run"
        )
    for each in held:
        if each.batch is None:
            raise CommandError(
                f"{each.run.name} does not tell its samples per update: give --batch-size, or log the hyper-parameter "
                "batch_size (self.save_hyperparameters())"
            )
    return measured


def _trade_off(measured: Sequence[ToTarget]) -> _TradeOff:
    held = [each for each in measured if each.updates]
    batches = sorted({_batch(each) for each in held})
    noise = [critical for each in held if (critical := _noise_scale(each)) is not None]
    scale = math.exp(float(np.log(noise).mean())) if noise else None
    told = "" if scale is None else f" The gradient noise scale says {scale:.4g}."
    updates = [float(each.updates or 0) for each in held]
    if len(batches) == 1:
        if scale is None:
            raise CommandError(
                f"the runs have one batch, {batches[0]:g}, and none logged a noise scale: give runs at several "
                "batches, or train one with the callback GradientNoiseScale"
            )
        taken = math.exp(float(np.log(updates).mean()))
        fit = CriticalBatchFit(*trade_off_at(scale, batches[0], taken))
        return _TradeOff(fit, held, f"Critical batch: the gradient noise scale, {scale:.4g}, of batch {batches[0]:g}.")
    fit = fit_critical_batch([_batch(each) for each in held], updates)
    source = f"Critical batch, fitted to {len(held)} runs at {len(batches)} batches: "
    if fit.critical_batch in (0, math.inf):
        what = "updates do not fall with the batch" if not fit.e_min else "updates fall in proportion to the batch"
        source += f"not within reach, for {what} from {batches[0]:g} to {batches[-1]:g}."
    else:
        source += f"{fit.critical_batch:.4g}"
        low, high = fit.intervals.get("critical_batch", (0.0, math.inf))
        source += f" (95 %: {low:.3g} to {high:.3g})." if low > 0 and high < math.inf else ", of unknown interval."
    if fit.left_out:
        worst = max(fit.left_out, key=lambda batch: abs(fit.left_out[batch]))
        source += f" A batch left out is predicted within {abs(fit.left_out[worst]):.0%}, the worst being {worst:g}."
    return _TradeOff(fit, held, source + told)


def _batch(each: ToTarget) -> float:
    return float(each.batch or math.inf)


def _noise_scale(each: ToTarget) -> float | None:
    """Return the critical batch that a run measured up to its target, else the last one."""
    for key in _NOISE:
        if key in each.run.metrics:
            series = each.run.metrics[key]
            before = series[series[:, 0] <= (each.updates or 0)]
            value = float((before if len(before) else series)[-1, 1])
            if value > 0:
                return value
    return None


def _runs_table(measured: Sequence[ToTarget]) -> ResultTable:
    rows = [
        Row(each.run.name, [
            "–" if each.batch is None else f"{each.batch:g}",
            *("–" if value is None else f"{value:,.0f}" for value in (each.updates, each.samples)),
            "–" if each.seconds is None else duration(each.seconds),
            "–" if (noise := _noise_scale(each)) is None else f"{noise:.4g}",
            each.outcome,
        ])
        for each in sorted(measured, key=lambda each: (_batch(each), each.run.name))
    ]  # fmt: skip
    columns = [Column(name) for name in ("Batch", "Updates", "Samples", "Time", "Noise scale", "Outcome")]
    return ResultTable(f"To {measured[0].target}", "Run", columns, rows)


def _plan(trade_off: _TradeOff, options: argparse.Namespace) -> ResultTable:
    fit, base = trade_off.fit, _batch(trade_off.base)
    given = _given(trade_off.base.run, options)
    per_update, per_sample = _pace(trade_off.held)
    names = {"lr": "Rate", "weight_decay": "Weight decay", "beta2": "beta2", "ema": "EMA"}
    columns = [names[name] for name in given] + ["Updates", "Samples"]
    if per_update is not None:
        columns += ["Time, as many times the devices", "Time, the same devices"]
    auto = options.rule == AUTO
    columns += ["Rate by", "Warm-up, updates"] if auto else []
    rows, choice = [], None
    for multiple in options.multiples or _multiples(fit.critical_batch, base, [_batch(x) for x in trade_off.held]):
        batch = base * multiple
        updates, samples = fit.updates(batch), fit.samples(batch)
        choice = _choice(options.optimizer, multiple, batch, updates, fit.critical_batch) if auto else None
        factor = None if choice is None else choice.factor
        cells = [f"{value:.4g}" for value in scaled(multiple, rule=options.rule, factor=factor, **given).values()]
        cells += [f"{updates:,.0f}", f"{samples:,.0f}"]
        if per_update is not None and per_sample is not None:
            cells += [duration(updates * per_update), duration(samples * per_sample)]
        cells += [] if choice is None else [choice.why.partition(",")[0], f"{choice.warmup_updates}"]
        rows.append(Row(f"×{multiple}: {batch:g}", cells))
    said = f"--rule {AUTO}, for {options.optimizer} at {batch:g}: {choice.why}." if choice is not None else ""
    return ResultTable("Plan", "Batch", [Column(name) for name in columns], rows, caption=said)


def _choice(optimizer: str, ratio: float, batch: float, updates: float, critical: float) -> Choice:
    """Return what the rule that chooses does at a batch, on the reference run's samples."""
    known = critical if critical < math.inf else None  # updates in proportion to the batch: no noise scale in sight
    made = max(1, round(updates))
    return choose([optimizer], ratio=ratio, batch_size=round(batch), train_longer=0.0, updates=made, noise_scale=known)


def _given(run: Run, options: argparse.Namespace) -> dict[str, float]:
    """Return the run's hyper-parameters, of the options or of what it logged."""
    found: Mapping[str, float | None] = {
        "lr": options.lr or learning_rate_of(run),
        "weight_decay": options.weight_decay or setting_of(run, "weight_decay"),
        "beta2": options.beta2 or setting_of(run, "beta2"),
        "ema": options.ema or setting_of(run, "ema_decay"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _pace(held: Sequence[ToTarget]) -> tuple[float | None, float | None]:
    """Return the seconds of an update at the smallest batch, and the fewest of a sample in any run."""
    timed = [each for each in held if each.seconds and each.updates]
    if not timed:
        return None, None
    smallest = min(timed, key=_batch)
    updates = [float(each.seconds or 0) / float(each.updates or 1) for each in timed if each.batch == smallest.batch]
    samples = [float(each.seconds or 0) / (float(each.updates or 1) * _batch(each)) for each in timed]
    return float(np.median(updates)), min(samples)


def _multiples(critical: float, base: float, batches: Sequence[float]) -> list[int]:
    """Return the powers of two from 1 to beyond four times the critical batch, and the largest batch that ran."""
    end = max(4 * critical if critical < math.inf else 0, *batches, base) / base
    return [2**power for power in range(1 + min(max(2, math.ceil(math.log2(end))), 12))]


def _notes(trade_off: _TradeOff) -> list[str]:
    fit = trade_off.fit
    notes = [
        "The trade-off holds for one target and for the best learning rate of each batch; it tells nothing of the "
        "accuracy beyond the target."
    ]
    if 0 < fit.critical_batch < math.inf:
        notes.append(
            f"At the critical batch both are twice their least, {fit.s_min:,.0f} updates and {fit.e_min:,.0f} samples; "
            "beyond it the best rate hardly grows, whatever the rule says."
        )
    return notes


def duration(seconds: float) -> str:
    """Return a time in words.

    Args:
        seconds: How long.

    Example:
        >>> duration(5.04), duration(600), duration(9000)
        ('5 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
