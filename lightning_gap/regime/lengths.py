"""Lengths of this run in a schedule of the reference run: told by their numbers, and refused."""

import re
from collections.abc import Callable, Iterable

from lightning_gap.regime.clock import ReferenceClock
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rates import Rollout
from lightning_gap.regime.rollout import hidden_lengths, roll_out, turns

__all__ = ["check_frequency", "check_lengths"]

# The parts of a run at which schedules are wont to turn.
_SHARES = (0.01, 0.02, 0.03, 0.05, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9)
# How a whole run's length is called, and what is a part of one.
_WHOLE = re.compile("T_max|total_steps|training_steps|t_initial|max_steps|: total$|: T$")
_WARM_UP = re.compile("warm")
# What ends before a run does, of whatever length.
_WITHIN = re.compile(r"StepLR\.(step_size|milestones)$")
Proven = Callable[[str, int], bool]
# A schedule of zeros for more than this share of the run is nobody's wish.
_IDLE = 0.1


def check_lengths(
    clock: ReferenceClock,
    plan: RegimePlan,
    *,
    trust: bool,
    batches: Iterable[int] = (),
    proven: Proven = lambda what, number: False,
) -> Rollout | None:
    """Roll a schedule out over the reference run, and refuse it if it fails there or has the length of another run.

    ``trust`` takes all its lengths for the reference run's; ``batches`` are further numbers of batches in an epoch of
    this run; ``proven`` says whether a number of it, or without one its curve, is known to be the reference run's.
    ``None`` where nothing limits the reference run.
    """
    name = type(clock.scheduler).__name__
    if plan.reference_updates is None:
        return None
    seen = roll_out(clock)
    if not trust and plan.reclocked and (found := _of_this_run(clock, plan, seen, batches, proven)):
        raise ValueError(found)
    if seen.error is not None:
        at = clock.reference_update_of(len(seen.rates)) if seen.rates else 0
        raise ValueError(
            f"{name} fails at update {at} of the reference run's {plan.reference_updates}: {seen.error} "
            f"{_remedy(clock, plan)}"
        )
    return seen


def check_frequency(clock: ReferenceClock, plan: RegimePlan, batches: Iterable[int]) -> None:
    """Refuse a scheduler that is stepped every so many updates as an epoch of this run has."""
    every = clock.frequency
    if clock.interval == "step" and plan.reclocked and every in _lengths(clock, plan, batches)[0]:
        raise ValueError(_told(clock, plan, f"{type(clock.scheduler).__name__}'s frequency", every, every))


def _of_this_run(
    clock: ReferenceClock, plan: RegimePlan, seen: Rollout, batches: Iterable[int], proven: Proven
) -> str | None:
    """Return what is wrong with a schedule that has a length of this run, or ``None``."""
    name = type(clock.scheduler).__name__
    ours, wholes = _lengths(clock, plan, batches)
    for what, length in hidden_lengths(clock.scheduler).items():
        suspects = wholes if _WHOLE.search(what) else ours
        if (
            length in suspects
            and (length != suspects[length] or not _WARM_UP.search(what))
            and not (length in wholes and _WITHIN.search(what))
            and not proven(what, length)
        ):
            return _told(clock, plan, what, length, suspects[length])
    if clock.interval == "epoch" or not seen.whole:
        return None
    here = (plan.reference_epochs or 0) * (plan.updates_per_epoch or 0)
    for what, at in turns(seen.rates).items():
        # A schedule may count from 0 or from 1, but for one that is known to be of reference epochs.
        for number in (at,) if _whole_epochs(at, plan) else (at, at - 1, at + 1):
            told = (what == "lowest" and number == here) or ours.get(number) == number
            if told and at != plan.reference_updates and not proven("", 0):
                return _told(clock, plan, f"{name}: {what}", at, number)
    if _rests(seen.rates) and not proven("", 0):
        return (
            f"{name} stays at its lowest rate for {_rests(seen.rates)} of the reference run's {len(seen.rates) - 1} "
            f"steps. {_remedy(clock, plan)}"
        )
    for whole in wholes:
        if whole in ours and _falls_to_a_round_share(seen.rates, whole) and not proven("", 0):
            return _told(clock, plan, f"{name}: a round share of the first rate", whole, whole)
    return None


def _rests(rates: list[float]) -> int:
    """Return in how many steps up to the end the learning rate stands still at next to nothing; 0 if in few."""
    top = max(rates)
    idle = next((count for count, rate in enumerate(reversed(rates)) if rate != rates[-1]), 0)
    nothing = abs(rates[-1]) <= 1e-9 * top
    return idle if idle > (_IDLE if nothing else 0.5) * len(rates) and rates[-1] <= 0.01 * top else 0


def _falls_to_a_round_share(rates: list[float], at: int) -> bool:
    """Return whether a decay is to a number of one digit after some steps, and not at its end."""
    if not 0 < at < len(rates) - 1 or not rates[0]:
        return False
    here, end = (rates[step] / rates[0] for step in (at, -1))
    before, now, after = rates[at - 1 : at + 2]
    if not before > now > after > 0 or abs(now / before - after / now) > 1e-9:
        return False  # no decay by one factor a step
    return 0 < here < 1 and end not in (0, here) and _is_round(here) and not _is_round(end)


def _is_round(share: float) -> bool:
    return abs(share - float(f"{share:.0e}")) <= 1e-9 * abs(share)


def _lengths(clock: ReferenceClock, plan: RegimePlan, batches: Iterable[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Return the lengths that are this run's and not the reference run's, in a clock's steps, and whole runs' alone.

    Of each it is told what whole it is a part or a multiple of. Numbers below ten are no evidence.
    """
    epochs = plan.reference_epochs or 1
    if clock.interval == "epoch":
        if plan.reference_epochs is None:
            return {}, {}
        by_hand = round(epochs * plan.ratio)  # as one who multiplies the epochs
        told = {each: each for each in (plan.epochs, by_hand) if each and each > 9 and each != epochs}
        return told, told
    here = {plan.updates_per_epoch or 1, *batches}
    if plan.samples is not None:
        here.add(plan.samples // plan.batch_size)
    # Batches of the reference run's size, of a replica or before accumulation, are as many as its own, or one fewer.
    here -= _epochs_rounded(plan)
    total = plan.reference_updates or 0
    theirs = _parts(total) | {total}
    theirs |= {total - part for part in _parts(total)} | {epochs}
    ours = {count * each: each for each in here if each > 9 for count in range(2, 11)}
    ours |= {part: each * epochs for each in here for part in _parts(each * epochs)}
    # A round number was rather written than computed.
    ours = {number: whole for number, whole in ours.items() if number % 50}
    runs = {each * epochs for each in here} | {plan.updates}
    wholes = {each: each for each in runs if each and each > 9 and each != total}
    ours |= wholes | {each: each for each in here if each > 9}
    theirs |= {each for each in ours if _whole_epochs(each, plan) and (each <= total or each not in wholes)}
    return {number: whole for number, whole in ours.items() if number not in theirs}, wholes


def _epochs_rounded(plan: RegimePlan) -> set[int]:
    """Return the updates of a reference epoch, as they are and as one counts who leaves an incomplete batch out."""
    there = plan.reference_updates_per_epoch or 1
    return {there} if plan.samples is None else {there, plan.samples // plan.reference_batch_size or 1}


def _whole_epochs(updates: int, plan: RegimePlan) -> bool:
    return any(updates % epoch == 0 for epoch in _epochs_rounded(plan))


def _parts(whole: int) -> set[int]:
    parts = {round_to(share * whole) for share in _SHARES for round_to in (int, round)}
    return {part for part in parts if part > 9}


def _told(clock: ReferenceClock, plan: RegimePlan, what: str, number: int, whole: int) -> str:
    part = f"{number}" if number == whole else f"{number}, a part or a multiple of {whole},"
    return f"{what} = {part} looks like a length of this run. {_remedy(clock, plan)}"


def _remedy(clock: ReferenceClock, plan: RegimePlan) -> str:
    if clock.interval == "epoch":
        length = f"{plan.reference_epochs} epochs, and this run {plan.epochs}"
    else:
        length = f"{plan.reference_updates} updates, {plan.reference_updates_per_epoch} an epoch"
    return (
        f"The reference run has {length}. Ask for lengths in configure_optimizers, where trainer.max_epochs, "
        "trainer.estimated_stepping_batches and len(loader) are the reference run's (a loader's batch_size is not), or "
        "write the reference run's number. If all lengths are the reference run's as they are, pass "
        "stretch_schedulers=True; if they are this run's, stretch_schedulers=False."
    )
