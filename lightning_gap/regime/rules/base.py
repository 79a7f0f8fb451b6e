"""What a rule of the learning rate says."""

from typing import TYPE_CHECKING, ClassVar

from lightning_gap.regime.rules.memory import MOST_FORGOTTEN, check_remembered
from lightning_gap.regime.rules.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["MOMENT_KEYS", "MOST_FORGOTTEN", "Rule"]

# The shares of the past that moments keep: Adam's, RMSprop's, and the ends between which a scheduler moves the first of
# Adam's.
MOMENT_KEYS = ("betas", "alpha", "max_momentum", "base_momentum")


class Rule:
    """How the learning rate follows the batch."""

    name: ClassVar[str]
    # Whether it keeps the learning rate times the samples, so that a run makes fewer updates, on the same samples.
    equal_samples: ClassVar[bool] = False
    moments: ClassVar[bool] = False  # whether the optimizer's moments and eps are scaled too

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers that it is derived for, by the names of their classes."""
        return tuple(name for name, kind in OPTIMIZERS.items() if self.name in kind.lr_rules)

    @property
    def also(self) -> str:
        """What it takes beside its optimizers, for the message of doubt."""
        return ""

    def factor(self, ratio: float) -> float:
        """Return what the learning rate is multiplied by."""
        raise NotImplementedError

    def check(self, optimizer: "Optimizer", ratio: float) -> None:
        r"""Refuse one of its optimizers whose moments would forget too much of the past for the rule to hold.

        That is at :math:`\kappa (1 - \beta) \geq 1/2`, for the ends too between which a scheduler moves them.
        """
        if not self.moments:
            return
        for group in optimizer.param_groups:
            for key in MOMENT_KEYS:
                check_remembered(key, group.get(key, ()), ratio, f'lr_rule="{self.name}"')

    def doubt(
        self, optimizer: "Optimizer", train_longer: float, *, told: tuple[bool, bool] = (False, False)
    ) -> str | None:
        """Return what is doubtful about an optimizer that it is not derived for, or refuse it by a ``ValueError``.

        ``told`` is whether weight decay, and the betas, have rules of their own.
        """
        raise ValueError(
            f'lr_rule="{self.name}" is a rule for {", ".join(self.optimizers)}{self.also}, and the optimizer is '
            f'{type(optimizer).__name__}. Pass lr_rule="none", which leaves its learning rate as it is, or a callable '
            "ratio -> factor to decide the factor yourself; or add a line for it to lightning_gap.regime.OPTIMIZERS."
        )
