"""What is worth a thought in a plan, said before training: measured in docs/results, not guessed."""

from collections.abc import Iterator

from lightning_gap.regime.plan import RegimePlan

__all__ = ["advice"]

# From here on a ratio is large: 32 was measured, and 8 was not.
_LARGE = 16.0


def advice(plan: RegimePlan, *, batchnorm: bool = False, ghosts: bool = False) -> Iterator[str]:
    """Yield what is doubtful or dear in a plan, a sentence each.

    Example:
        >>> from lightning_gap.regime import plan_regime
        >>> plan = plan_regime(reference_batch_size=128, batch_size=4096, samples=50_000, max_epochs=50)
        >>> print(*advice(plan))
        The run sees 30.1 times the samples of the reference run: train_longer=0.1 makes it 4.1 times.
    """
    there, here = plan.reference_samples_seen, plan.samples_seen
    if there and here and here / there >= 8 and plan.train_longer > 0.1:
        least = 1 + 0.1 * (plan.ratio - 1)
        yield (
            f"The run sees {here / there:.3g} times the samples of the reference run: train_longer=0.1 makes it "
            f"{least:.2g} times."
        )
    if plan.rule_told == "sqrt" and not plan.train_longer and plan.ratio >= _LARGE:
        yield (
            f'At the reference run\'s samples and the ratio {plan.ratio:g}, lr_rule="sqrt" did worse than no scaling: '
            'try lr_rule="none" or train_longer=0.1.'
        )
    if plan.rule_told == "linear" and not plan.warmup_updates and plan.ratio > 1:
        yield 'lr_rule="linear" without a warm-up is apt to diverge: pass warmup_updates, five epochs in its paper.'
    if batchnorm and not ghosts and plan.ratio > 1:
        yield (
            f"The model has BatchNorm, whose statistics are those of the large batch: GhostBatchNorm("
            f"{plan.reference_batch_size}) keeps the reference run's."
        )
    last, updates = plan.small_last_batch(plan.batch_size), plan.updates_per_epoch
    if last and updates and updates <= 4 and 2 * last < plan.batch_size:
        yield (
            f"1 in {updates} updates is over {last} samples, at the rate of {plan.batch_size}: drop_last=True in the "
            "DataLoader leaves it out."
        )
