"""``lightning-gap plan``: what a regime becomes at another batch, without training."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from lightning_gap.commands.parsing import CommandError, at_least, between, numbers, positive
from lightning_gap.commands.trainer import require_jsonargparse
from lightning_gap.regime.rules import OPTIMIZERS, RULE_NAMES
from lightning_gap.regime.rules.auto import AUTO, rules_for

__all__ = ["add", "names_config", "names_runs", "plan_config", "plan_from"]


def add(commands: Any) -> None:
    """Add the command to a parser."""
    plan = commands.add_parser(
        "plan",
        help="print what a small-batch regime becomes at another batch, without training",
        description="Print the plan that LargeBatchRegime would make: learning rate, updates, epochs and where the "
        "schedule falls, the reference run beside the run at the other batch. Give --samples to know the epochs, "
        "and --epochs or --updates to know the length. Or give --config FILE, a configuration of LightningCLI with a "
        "LargeBatchRegime, and what overrides it: then its own module and data are planned, all but trained. Or give "
        "--from RUN [RUN ...], runs that were logged, with --target METRIC>=VALUE: then what other batches take to the "
        "target is read from them (--from RUN --help lists the options).",
    )
    plan.add_argument("-c", "--config", metavar="FILE", help="plan a configuration; no option below goes with it")
    plan.add_argument("--from", metavar="RUN", help="plan from logged runs; other options go with it")
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
    regime.add_argument("--validate-every", type=at_least(1), metavar="N", help="epochs between its validations")
    regime.add_argument("--patience", type=at_least(1), metavar="N", help="validations without progress that end it")
    change = plan.add_argument_group("the change")
    change.add_argument(
        "--rule", choices=(*RULE_NAMES, AUTO), default="sqrt",
        help="how the rate follows the batch (default: sqrt); auto chooses, and says why",
    )  # fmt: skip
    change.add_argument(
        "--optimizer", choices=tuple(OPTIMIZERS), metavar="CLASS",
        help="for --rule auto: its class, or the nearest that it derives from, as AdamW",
    )  # fmt: skip
    change.add_argument(
        "--noise-scale", type=positive, metavar="N", help="for --rule auto: in samples, as GradientNoiseScale measured"
    )
    change.add_argument(
        "--train-longer", type=between(0, 1), metavar="SHARE",
        help="from 0, the reference run's epochs, to 1, its updates (default: 1; 0 for linear and adam)",
    )  # fmt: skip
    change.add_argument("--warmup-updates", type=at_least(0), default=0, metavar="N", help="updates of the warm-up")
    change.add_argument("--clip-norm", type=positive, metavar="NORM", help="the gradient norm that is not exceeded")
    plan.set_defaults(run=_plan)


def names_config(words: Sequence[str]) -> bool:
    """Return whether words name a configuration to plan."""
    return any(word.partition("=")[0] in ("-c", "--config") for word in words)


def names_runs(words: Sequence[str]) -> bool:
    """Return whether words name runs to plan from."""
    return any(word.partition("=")[0] == "--from" for word in words)


def plan_from(words: Sequence[str]) -> None:
    """Print what other batches take, from the logs of runs."""
    from lightning_gap.commands.plan_from import run

    run(words)


def plan_config(words: Sequence[str]) -> None:
    """Print the plan of a configuration."""
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
    if options.samples is None and (options.validate_every or options.patience):
        raise CommandError("--validate-every and --patience count epochs and need --samples")
    options.scheduler = scheduler
    for option, value in (("--optimizer", options.optimizer), ("--noise-scale", options.noise_scale)):
        if value is not None and options.rule != AUTO:
            raise CommandError(f"{option} is for --rule auto alone, and the rule is {options.rule}")
    if options.rule == AUTO and options.optimizer is None:
        raise CommandError("--rule auto chooses by the optimizer: give --optimizer, as SGD or AdamW")
    if options.rule == AUTO and options.epochs is None and options.updates is None:
        raise CommandError(
            "--rule auto warms up over a share of the run: give its length, --epochs with --samples or --updates"
        )


def _plan(options: argparse.Namespace) -> None:
    _check(options)
    from lightning_gap.regime.clock import share_of
    from lightning_gap.regime.group_changes import decided
    from lightning_gap.regime.plan import RegimePlan
    from lightning_gap.regime.planned import plan_regime
    from lightning_gap.regime.scaling import default_train_longer, lr_factor
    from lightning_gap.trainer.terminal import say

    longer = default_train_longer(options.rule) if options.train_longer is None else options.train_longer
    sizes = {"reference_batch_size": options.reference_batch_size, "batch_size": options.batch_size}
    auto = options.rule == AUTO
    factor = 1.0 if auto else lr_factor(options.rule, options.batch_size / options.reference_batch_size)
    rules = rules_for(options.rule, None, None)
    plan = RegimePlan(**sizes, lr_rule=options.rule, lr_factor=factor, train_longer=longer, rules=rules)
    if options.samples is not None:
        try:
            plan = plan_regime(
                **sizes,
                lr_rule=options.rule,
                samples=options.samples,
                drop_last=options.drop_last,
                max_epochs=options.epochs,
                max_steps=options.updates,
                train_longer=longer,
            )
        except ValueError as error:
            raise CommandError(
                str(error).replace("drop_last=False in the DataLoader", "leave out --drop-last")
            ) from None
    elif options.updates is not None:  # in epochs so long that the last batch does not count
        equal_samples = Fraction(options.reference_batch_size, options.batch_size)
        share = equal_samples + share_of(longer) * (1 - equal_samples)
        plan = replace(plan, reference_updates=options.updates, updates=math.ceil(options.updates * share))
    warmup = 0 if factor == 1 and not auto else options.warmup_updates
    plan = replace(plan, warmup_updates=warmup, clip_norm=options.clip_norm)
    if auto:
        plan = decided(plan, [options.optimizer], options.noise_scale)
        plan = replace(plan, hyperparameters=tuple(_following(plan, options.optimizer)))
    if options.lr is not None:
        plan = replace(plan, learning_rates=((options.lr, options.lr * plan.lr_factor),))
    plan = replace(plan, curve=_curve(plan, options))
    table = plan.table()
    if plan.moment_ratio != 1:
        table.add_row("Adam's 1 - beta and epsilon", "", f"x{plan.ratio:g} and x{plan.ratio**-0.5:.4g}")
    for row in (*_schedule(plan, options), *_validations(plan, options)):
        table.add_row(*row)
    say(table, *_notes(plan, options))


def _following(plan: Any, optimizer: str) -> Iterator[tuple[str, str, str]]:
    """Yield what else follows the batch, by the rules that come with the one that chooses."""
    kind, rescaling = OPTIMIZERS[optimizer], plan.rescaling
    decay, where = rescaling.pace / rescaling.lr_factor, ", where it is decoupled"
    if kind.decoupled and decay != 1:
        told = f"x{decay:.4g}{where if isinstance(kind.decoupled, str) else ''}"
        yield f"weight decay ({plan.rules.weight_decay})", "", told
    if kind.second_moments and rescaling.pace != 1:
        yield f"second moments' beta ({plan.rules.betas})", "beta", f"beta^{rescaling.pace:.4g}"


def _curve(plan: Any, options: argparse.Namespace) -> Any:
    """Return five points of the learning rate, by the scheduler that the options mean."""
    if options.lr is None or (options.samples is None and plan.updates != plan.reference_updates):
        return ()  # of another length, and nothing tells where an epoch ends
    from lightning_gap.regime.clock import ReferenceClock
    from lightning_gap.regime.rates import cosine_rates, curve, milestone_rates

    if options.scheduler == "constant" or plan.updates is None:
        return curve(plan, options.lr, [])
    clock = ReferenceClock.of(plan, None, "step" if options.scheduler == "cosine" else "epoch")
    if clock.last is None:
        return curve(plan, options.lr, [])
    steps = clock.steps_until(clock.last)
    if options.scheduler == "cosine":
        return curve(plan, options.lr, [(clock, cosine_rates(options.lr, plan.reference_updates, steps))])
    return curve(plan, options.lr, [(clock, milestone_rates(options.lr, options.milestones, options.gamma, steps))])


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


def _validations(plan: Any, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield how many updates lie between validations, and how many an early stopping waits."""
    if options.validate_every is None and options.patience is None:
        return
    every = options.validate_every or 1
    there, here = every * plan.reference_updates_per_epoch, every * plan.stretched_epoch
    epochs = f"{every} epoch{'s' if every > 1 else ''}"
    wait = f", when an epoch of {plan.updates_per_epoch} ends" if plan.stretch != 1 else ""
    yield "validation", f"every {epochs}: {there} updates", f"every {float(here):.6g} updates{wait}"
    if options.patience is not None:
        count, now = options.patience, float(options.patience * here)
        yield "patience", f"{count} validations: {count * there} updates", f"{count} validations: {now:.6g} updates"


def _notes(plan: Any, options: argparse.Namespace) -> Iterator[str]:
    from lightning_gap.regime.rules.base import MOST_FORGOTTEN
    from lightning_gap.regime.scaling import EQUAL_SAMPLES

    there, here = plan.reference_samples_seen, plan.samples_seen
    if there and here and abs(here / there - 1) > 0.005:
        epochs = f"{plan.epochs} epochs instead of {plan.reference_epochs}: " if plan.epochs else ""
        yield f"{epochs}{here / there:.3g} times the samples, and the computation, of the reference run."
    if plan.train_longer and plan.lr_rule in EQUAL_SAMPLES:
        yield f"The rule {plan.lr_rule} is derived for the same samples: leave out --train-longer to keep to them."
    if plan.moment_ratio > 1:
        least = 1 - MOST_FORGOTTEN / plan.moment_ratio
        yield f"Training refuses a beta of {least:.6g} or less: ratio * (1 - beta) must be under {MOST_FORGOTTEN}."
    if options.samples is None and options.updates is None:
        yield "Give --samples with --epochs, or --updates, to plan the length too."
