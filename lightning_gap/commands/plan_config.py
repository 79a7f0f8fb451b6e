"""``lightning-gap plan --config``: the plan of a configuration with its own module and data, without training."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_gap import LargeBatchRegime
from lightning_gap.commands.map_cli import MapCLI, run_cli
from lightning_gap.commands.parsing import CommandError
from lightning_gap.terminal import say

__all__ = ["run"]

_ABSENT = (
    "the configuration has no LargeBatchRegime: add it to trainer.callbacks, or --trainer.callbacks+=LargeBatchRegime "
    "--trainer.callbacks.reference_batch_size=256"
)
# What would train, or write, before the first update.
_TUNERS = (BatchSizeFinder, LearningRateFinder)


def run(words: Sequence[str]) -> None:
    """Print the plan of a configuration.

    Args:
        words: ``--config FILE`` and what overrides it, as for ``fit``; ``--model CLASS`` and ``--data CLASS`` say which
            classes a file means that gives their arguments alone.

    Raises:
        CommandError: Something is wrong with them, or with what they name, or there is no regime to plan.
    """
    sys.path.insert(0, os.getcwd())  # for modules beside the configuration, as `python script.py` finds them
    try:
        run_cli(PlanCLI, ["fit", *_with_classes(list(words))])
    except CommandError as error:
        hint = "" if "does not accept" not in str(error) and "not expected" not in str(error) else _HINT
        raise CommandError(f"{error}{hint}") from None


_HINT = " (a file that names no class is MongeMap's: --model package.module.Class, --data likewise, say which it means)"


class PlanCLI(MapCLI):
    """``lightning-gap fit`` that stops before the first update, on one process, and writes nothing."""

    def before_instantiate_classes(self) -> None:
        """Take one CPU for all devices, and no logger."""
        super().before_instantiate_classes()
        self.save_config_callback = None
        trainer = self._given("trainer")
        self._replicas = _replicas(trainer)
        accumulate = (trainer.get("accumulate_grad_batches") or 1) * self._replicas
        one = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
        silent = {"logger": False, "profiler": None, "plugins": None, "sync_batchnorm": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        trainer.update({**one, **silent, **quiet, "accumulate_grad_batches": accumulate})

    def before_fit(self) -> None:
        """Let training end where it would begin."""
        trainer: Any = self.trainer
        regime = next((callback for callback in trainer.callbacks if isinstance(callback, LargeBatchRegime)), None)
        if regime is None:
            raise CommandError(_ABSENT)
        for tuner in [callback for callback in trainer.callbacks if isinstance(callback, _TUNERS)]:
            trainer.callbacks.remove(tuner)
            say(f"{type(tuner).__name__} is left out: it would train")
        if self._replicas > 1:
            say(f"{self._replicas} replicas are planned as {self._replicas} times the accumulation on one")

        def instead_of_training() -> None:
            trainer.fit_loop.setup_data()
            regime.on_train_start(trainer, trainer.lightning_module)  # it compares the data with the plan

        trainer.fit_loop.run = instead_of_training

    def after_fit(self) -> None:
        """There is nothing to save."""


def _replicas(trainer: Any) -> int:
    """Return the data-parallel processes that a trainer's settings mean."""
    devices, accelerator = trainer.get("devices", "auto"), str(trainer.get("accelerator", "auto"))
    if devices in ("auto", "-1", -1):
        here = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 1
        if not here and accelerator != "auto":
            raise CommandError(f"--trainer.devices {devices} counts devices that are not here: give their number")
        count = here or 1
    elif isinstance(devices, str) and "," in devices:
        count = len([device for device in devices.split(",") if device.strip()])
    else:
        count = len(devices) if isinstance(devices, list) else int(devices)
    strategy = trainer.get("strategy")
    sharded = strategy.get("init_args", {}) if hasattr(strategy, "get") else {}
    tensor_parallel = sharded.get("tensor_parallel_size", 1)
    count *= int(trainer.get("num_nodes") or 1)
    return max(count // tensor_parallel, 1) if isinstance(tensor_parallel, int) else 1


def _with_classes(words: list[str]) -> list[str]:
    """Give the arguments in a file to the classes that ``--model`` and ``--data`` name, if it names none."""
    places = [i for i, word in enumerate(words[:-1]) if word in ("--config", "-c")]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    places = [i + 1 for i, word in enumerate(words[:-1]) if word in ("--config", "-c")]
    for place in places:
        try:
            with open(words[place], encoding="utf-8") as file:
                settings = yaml.safe_load(file)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # said by the parser
        changed = False
        for part in ("model", "data"):
            named = _class_named(words, part)
            given = settings.get(part) if isinstance(settings, dict) else None
            if named and isinstance(settings, dict) and not (isinstance(given, str) or "class_path" in (given or {})):
                settings[part] = {"class_path": named, "init_args": given or {}}
                changed = True
        if changed:
            words[place] = json.dumps(settings)
    for part in ("model", "data"):
        if len(places) and (named := _class_named(words, part)):
            at = next(i for i, word in enumerate(words) if word in (f"--{part}", f"--{part}={named}"))
            del words[at : at + (1 if "=" in words[at] else 2)]
    return words


def _class_named(words: Sequence[str], part: str) -> str | None:
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == f"--{part}":
            value = value if equals else words[i + 1] if i + 1 < len(words) else ""
            return value if value.replace(".", "").replace("_", "").isalnum() else None
    return None
