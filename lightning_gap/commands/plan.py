"""``lightning-gap plan``: what a regime becomes at another batch, without training."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning_gap.commands.parsing import CommandError, at_least, between, numbers, positive
from lightning_gap.commands.trainer import require_jsonargparse

__all__ = ["add", "names_config", "plan_config"]

_RULES = ("sqrt", "linear", "adam", "none")


def add(commands: Any) -> None:
    """Add the command to a parser.

    Args:
        commands: What ``parser.add_subparsers`` returned.
    """
    plan = commands.add_parser(
        "plan",
        help="print what a small-batch regime becomes at another batch, without training",
        description="Print the plan that LargeBatchRegime would make: learning rate, updates, epochs and where the "
        "schedule falls, the reference run beside the run at the other batch. Give --samples to know the epochs, "
        "and --epochs or --updates to know the length.",
    )
    needed = plan.add_argument_group("the two runs")
    needed.add_argument(
        "--batch-size", type=at_least(1), required=True, metavar="N",
        help="samples per update of the run to plan: loader's batch × accumulation × devices",
    )  # fmt: skip
    needed.add_argument(
        "--reference-batch-size", type=at_least(1), required=True, metavar="N",
        help="samples per update of the run whose regime it is",
    )  # fmt: skip
    needed.add_argument("--samples", type=at_least(1), metavar="N", help="samples in the training data")
    needed.add_argument("--drop-last", action="store_true", help="the loader drops an incomplete last batch")
    regime = plan.add_argument_group("the reference run's regime")
    regime.add_argument("--epochs", type=at_least(1), metavar="N", help="its epochs; needs --samples")
    regime.add_argument("--updates", type=at_least(1), metavar="N", help="its updates, if they end it")
    regime.add_argument("--lr", type=positive, metavar="RATE", help="its first learning rate")
    regime.add_argument("--scheduler", choices=("constant", "milestones", "cosine"), help="how its rate falls "
                        "(default: milestones if they are given, else constant)")  # fmt: skip
    regime.add_argument(
        "--milestones", type=numbers, metavar="E,E,...", help="epochs after which its rate falls, as 30,60,80"
    )
    regime.add_argument(
        "--gamma", type=positive, default=0.1, metavar="FACTOR", help="by what it falls there (default: 0.1)"
    )
    change = plan.add_argument_group("the change")
    change.add_argument("--rule", choices=_RULES, default="sqrt", help="how the rate follows the batch (default: sqrt)")
    change.add_argument(
        "--train-longer", type=between(0, 1), default=1.0, metavar="SHARE",
        help="from 0, the reference run's epochs, to 1, its updates (default: 1)",
    )  # fmt: skip
    change.add_argument("--warmup-updates", type=at_least(0), default=0, metavar="N", help="updates of the warm-up")
    change.add_argument("--clip-norm", type=positive, metavar="NORM", help="the gradient norm that is not exceeded")
    plan.set_defaults(run=_plan)


def names_config(words: Sequence[str]) -> bool:
    """Return whether words name a configuration to plan."""
    return any(word.partition("=")[0] in ("-c", "--config") for word in words)


def plan_config(words: Sequence[str]) -> None:
    """Print the plan of a configuration.

    Args:
        words: ``--config FILE`` and what overrides it.

    Raises:
        CommandError: Something is wrong with them, or with what they name.
    """
    require_jsonargparse("plan --config")
    from lightning_gap.commands.plan_config import run

    run(words)


def _check(options: argparse.Namespace) -> None:
    if options.epochs is not None and options.samples is None:
        raise CommandError("--epochs needs --samples, the samples in the training data: or give --updates")
    scheduler = options.scheduler or ("milestones" if options.milestones else "constant")
    if scheduler == "milestones" and not options.milestones:
        raise CommandError("--scheduler milestones needs --milestones, as 30,60,80")
    if options.milestones and scheduler != "milestones":
        raise CommandError(f"--milestones do not go with --scheduler {scheduler}: leave one of them out")
    if scheduler != "constant":
        if options.lr is None:
            raise CommandError(f"--scheduler {scheduler} needs --lr, the reference run's first learning rate")
        if options.samples is None:
            raise CommandError(f"--scheduler {scheduler} counts epochs and needs --samples")
    if scheduler == "cosine" and options.epochs is None:
        raise CommandError("--scheduler cosine needs --epochs, over which it falls to 0")
    if options.milestones and options.epochs is not None and options.milestones[-1] >= options.epochs:
        raise CommandError(
            f"--milestones {options.milestones[-1]} is not before the end of --epochs {options.epochs}: leave it out"
        )
    options.scheduler = scheduler


def _plan(options: argparse.Namespace) -> None:
    _check(options)
    from lightning_gap.regime.plan import RegimePlan, plan_regime, updates_in_epoch
    from lightning_gap.regime.scaling import lr_factor
    from lightning_gap.terminal import say

    factor = lr_factor(options.rule, options.batch_size / options.reference_batch_size)
    plan = RegimePlan(options.reference_batch_size, options.batch_size, options.rule, factor)
    try:
        if options.samples is not None:
            sizes = (options.reference_batch_size, options.batch_size)
            reference, here = (updates_in_epoch(options.samples, b, drop_last=options.drop_last) for b in sizes)
            if not options.train_longer:
                plan = _same_epochs(plan, options, reference, here)
            else:
                plan = plan_regime(
                    reference_batch_size=options.reference_batch_size,
                    batch_size=options.batch_size,
                    lr_rule=options.rule,
                    lr_factor=factor,
                    reference_updates_per_epoch=reference,
                    updates_per_epoch=here,
                    max_epochs=options.epochs,
                    max_steps=options.updates,
                    train_longer=options.train_longer,
                )
        elif options.updates is not None:
            if options.train_longer not in (0, 1):
                raise CommandError(f"--train-longer {options.train_longer:g} needs --samples, to know the epochs")
            share = {"reference_updates": options.updates, "updates": options.updates}
            plan = replace(plan, train_longer=options.train_longer, **share)
    except ValueError as error:
        raise CommandError(str(error)) from None
    plan = replace(
        plan,
        warmup_updates=0 if factor == 1 else options.warmup_updates,
        clip_norm=options.clip_norm,
        learning_rates=() if options.lr is None else ((options.lr, options.lr * factor),),
    )
    table = plan.table()
    if not plan.train_longer and plan.updates is not None:
        table.add_row("updates", f"{plan.reference_updates}", f"{plan.updates}")
    if plan.moment_ratio != 1:
        table.add_row("Adam's 1 - beta and epsilon", "", f"x{plan.ratio:g} and x{plan.ratio**-0.5:.4g}")
    for row in _schedule(plan, options):
        table.add_row(*row)
    say(table, *_notes(plan, options))


def _same_epochs(plan: Any, options: argparse.Namespace, reference: int, here: int) -> Any:
    """Return the plan of a run that is not trained longer: epochs and limits stay as they are."""
    if reference < 1 or here < 1:
        raise CommandError(f"--samples {options.samples} with --drop-last leave an epoch without an update")

    def updates(each: int) -> int | None:
        limits = [options.epochs and options.epochs * each, options.updates]
        return min((limit for limit in limits if limit), default=None)

    return replace(
        plan,
        reference_updates_per_epoch=reference,
        updates_per_epoch=here,
        reference_updates=updates(reference),
        updates=updates(here),
    )


def _schedule(plan: Any, options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Return where the reference run's schedule falls in either run."""
    if options.scheduler == "cosine":
        return [("cosine", f"to 0 over {plan.reference_updates} updates", f"to 0 over {plan.updates} updates")]
    rows = []
    for count, epoch in enumerate(options.milestones or (), 1):
        share = options.gamma**count
        there, at = epoch * plan.reference_updates_per_epoch, math.ceil(epoch * plan.stretched_epoch)
        rows.append(
            (
                f"learning rate x{options.gamma:g} after",
                f"epoch {epoch}, update {there}: {options.lr * share:.4g}",
                f"epoch {at / plan.updates_per_epoch:.5g}, update {at}: {options.lr * plan.lr_factor * share:.4g}",
            )
        )
    return rows


def _notes(plan: Any, options: argparse.Namespace) -> Iterator[str]:
    from lightning_gap.regime.scaling import MOST_FORGOTTEN

    if plan.epochs is not None and plan.reference_epochs:
        cost = plan.epochs / plan.reference_epochs
        yield (
            f"{plan.epochs} epochs instead of {plan.reference_epochs}: {cost:.3g} times the samples of the reference "
            "run, in updates that one device or many can share."
        )
    if plan.moment_ratio > 1:
        least = 1 - MOST_FORGOTTEN / plan.moment_ratio
        yield f"Training refuses a beta of {least:.6g} or less: ratio * (1 - beta) must be under {MOST_FORGOTTEN}."
    if options.samples is None and options.updates is None:
        yield "Give --samples with --epochs, or --updates, to plan the length too."
