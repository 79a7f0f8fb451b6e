"""What a rule of the learning rate says."""

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Rule"]


class Rule:
    """How the learning rate follows the batch.

    Attributes:
        name: What it is called.
        optimizers: The optimizers that it is derived for, by the names of their classes, since most are other
            libraries'.
        equal_samples: Whether it keeps the learning rate times the samples, so that a run with it makes fewer updates,
            on the same samples.
        moments: Whether the optimizer's moments and eps are scaled too.
        also: What it takes beside its optimizers, for the message of :meth:`doubt`.
    """

    name: ClassVar[str]
    optimizers: ClassVar[tuple[str, ...]] = ()
    equal_samples: ClassVar[bool] = False
    moments: ClassVar[bool] = False
    also: ClassVar[str] = ""

    def factor(self, ratio: float) -> float:
        """Return what the learning rate is multiplied by."""
        raise NotImplementedError

    def check(self, optimizer: "Optimizer", ratio: float) -> None:
        """Refuse one of its optimizers for what it has been given."""

    def doubt(self, optimizer: "Optimizer", train_longer: float) -> str | None:
        """Return what is doubtful about an optimizer that it is not derived for, or refuse it.

        Raises:
            ValueError: If the rule is not for it.
        """
        raise ValueError(
            f'lr_rule="{self.name}" is a rule for {", ".join(self.optimizers)}{self.also}, and the optimizer is '
            f'{type(optimizer).__name__}. Pass lr_rule="none", which leaves its learning rate as it is, or a callable '
            "ratio -> factor to decide the factor yourself."
        )
