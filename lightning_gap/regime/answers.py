"""What a trainer answers about lengths while the user's code writes the reference run: the reference run's numbers."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

__all__ = ["ReferenceAnswers"]

# What a trainer is asked for, and what it answers only while one of the two is on.
_LENGTHS = ("max_epochs", "max_steps", "num_training_batches", "accumulate_grad_batches", "estimated_stepping_batches")
_ONE_DEVICE = ("world_size", "num_devices", "num_nodes")
_PLACES = ("current_epoch", "global_step")
# Whose questions are answered with the truth: the loops that really run, and what plans them.
_TRUTH_FOR = (
    "lightning.pytorch.",
    "lightning.fabric.",
    "torch.",
    "lightning_gap.regime.",
    "lightning_gap.ghost.",
    "lightning_gap.trainer.strategy",
)


class ReferenceAnswers:
    """Lets a trainer, and the length of its training loader, answer as in the reference run.

    What the user writes in ``configure_optimizers`` and in the setup hooks before it is the reference run: one device,
    its own batch, no accumulation. So whatever it asks of lengths there, ``lengths`` answers by the name of the
    trainer's attribute. The trainer's own loops are told the truth.
    """

    def __init__(
        self,
        trainer: Trainer,
        lengths: Callable[[], dict[str, Any]],
        is_training_loader: Callable[[Any], bool],
    ) -> None:
        self._trainer, self._lengths = trainer, lengths
        self._is_training_loader = is_training_loader
        self._kind = type(trainer)
        self._answers: dict[str, Any] = {}
        self._lengths_on = False
        self._asking = False
        self._reference = type(
            self._kind.__name__,
            (self._kind,),
            {"__module__": self._kind.__module__, "__qualname__": self._kind.__qualname__}
            | {name: self._property(name) for name in (*_LENGTHS, *_ONE_DEVICE, *_PLACES)},
        )
        self._module: LightningModule | None = None
        self._users: Callable[..., Any] | None = None  # a configure_optimizers that is the instance's own
        self._length: tuple[type, Any] | None = None  # the class whose __len__ is ours, and its own one

    def _property(self, name: str) -> property:
        inherited = getattr(self._kind, name, None)

        def get(trainer: Any) -> Any:
            if name in self._answers:
                return self._answers[name]
            if self._lengths_on and name in _LENGTHS and not self._asks_for_truth():
                answers = self._ask()
                if name in answers:
                    return answers[name]
            return inherited.__get__(trainer) if isinstance(inherited, property) else vars(trainer)[name]

        def put(trainer: Any, value: Any) -> None:
            if isinstance(inherited, property):
                inherited.__set__(trainer, value)
            else:
                vars(trainer)[name] = value

        return property(get, put)

    def _asks_for_truth(self) -> bool:
        return self._asking or _asking_module().startswith(_TRUTH_FOR)

    def _ask(self) -> dict[str, Any]:
        self._asking = True  # planning asks the trainer itself
        try:
            return self._lengths()
        finally:
            self._asking = False

    def begin(
        self, pl_module: LightningModule, loader: type, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        """Answer with the reference run's lengths, until ``configure_optimizers`` has returned."""
        trainer: Any = self._trainer
        trainer.__class__, self._lengths_on = self._reference, True
        self._module, self._users = pl_module, vars(pl_module).get("configure_optimizers")
        configure = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            before()
            self._answers.update(dict.fromkeys(_ONE_DEVICE, 1))
            try:
                return configure()
            finally:
                self.end()
                after()

        pl_module.configure_optimizers = _Ours(pl_module, configure_optimizers)  # type: ignore[method-assign]
        self._answer_length(loader)

    def _answer_length(self, loader: type) -> None:
        own = getattr(loader, "__len__", None)
        if own is None:
            return
        self._length = (loader, vars(loader).get("__len__"))

        def length(this: Any) -> int:
            if self._asks_for_truth():
                return int(own(this))
            batches = (self._ask() | self._answers).get("num_training_batches")
            return int(own(this)) if batches is None or not self._is_training_loader(this) else int(batches)

        loader.__len__ = length  # type: ignore[attr-defined]

    def configured_otherwise(self, pl_module: LightningModule, loader: type, lengths: dict[str, Any]) -> Any:
        """Return what ``configure_optimizers`` returns to other answers, and leave the module as it was."""
        trainer: Any = self._trainer
        module_has = dict(vars(pl_module))
        self._answers = lengths | dict.fromkeys(_ONE_DEVICE, 1)
        trainer.__class__ = self._reference
        self._answer_length(loader)
        try:
            with isolate_rng(include_cuda=False):
                return pl_module.configure_optimizers()
        finally:
            self.end()
            vars(pl_module).clear()
            vars(pl_module).update(module_has)

    def end(self) -> None:
        """Answer with the truth again."""
        trainer: Any = self._trainer
        trainer.__class__, self._lengths_on = self._kind, False
        self._answers = {}
        if self._module is not None:
            if self._users is None:
                vars(self._module).pop("configure_optimizers", None)
            else:
                self._module.configure_optimizers = self._users  # type: ignore[method-assign]
            self._module = self._users = None
        if self._length is not None:
            loader, own = self._length
            if own is None:
                del loader.__len__  # type: ignore[attr-defined]
            else:
                loader.__len__ = own  # type: ignore[attr-defined]
            self._length = None

    @contextmanager
    def at(self, epoch: int, update: int) -> Iterator[None]:
        """Answer as the reference run does at one of its updates, its place included."""
        trainer: Any = self._trainer
        before = type(self._trainer), self._answers
        self._answers = {**self._ask(), "current_epoch": epoch, "global_step": update}
        trainer.__class__ = self._reference
        try:
            yield
        finally:
            trainer.__class__, self._answers = before


def _asking_module() -> str:
    """Return the name of the module that asked: it called what called the caller of this."""
    frame = inspect.currentframe()
    for _ in range(3):
        frame = None if frame is None else frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


class _Ours:
    """A module's ``configure_optimizers`` while a fit plans: a copy of the module, such as an average, has its own."""

    def __init__(self, pl_module: LightningModule, configure: Callable[[], Any]) -> None:
        self._module, self._configure = pl_module, configure

    def __call__(self) -> Any:
        return self._configure()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._module)]
        return MethodType(type(copied).configure_optimizers, copied)


def length_holder(loader: Any) -> type:
    """Return the class whose length is asked for where a training loader's is; a ``DataLoader`` if there is none."""
    return DataLoader if loader is None else type(loader)
