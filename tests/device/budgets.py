"""What a step may cost: counters held to budgets, told by place where they are exceeded."""

from counts import Counts


def within(counts: Counts, **budgets: int) -> None:
    """Assert that each counter named is at most its budget.

    Args:
        counts: What has been counted.
        budgets: ``syncs``, ``uploads`` or ``launches``, and their most.
    """
    for name, most in budgets.items():
        total = getattr(counts, name).total()
        assert total <= most, f"{total} {name} are more than {most}:\n{counts.table(name)}"
