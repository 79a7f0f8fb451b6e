"""``lightning-gap plan --config``: the plan of a configuration with its own module and data, without training."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.cli import LightningArgumentParser

from lightning_gap import LargeBatchRegime
from lightning_gap.commands.map_cli import MapCLI, UnknownOptionError, loaded, names_a_class, run_cli
from lightning_gap.commands.parsing import CommandError
from lightning_gap.trainer.terminal import say

__all__ = ["run"]

_ABSENT = (
    "the configuration has no LargeBatchRegime: add it to trainer.callbacks, or --trainer.callbacks+=LargeBatchRegime "
    "--trainer.callbacks.reference_batch_size=256"
)
_HINT = (
    "; a file that names no class is MongeMap's: say which it means by --model package.module.Class, --data likewise"
)
_PARTS = {"--model": "model", "--data": "data"}
_OPTION = re.compile(r"(--config|-c|--model|--data)=")
# What would train before the first update.
_TUNERS = (BatchSizeFinder, LearningRateFinder)


def run(words: Sequence[str]) -> None:
    """Print the plan of a configuration: of ``--config FILE`` and what overrides it, as for ``fit``.

    ``--model CLASS`` and ``--data CLASS`` say which classes a file means that gives their arguments alone.
    """
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())  # for modules beside the configuration, as `python script.py` finds them
    try:
        run_cli(PlanCLI, ["fit", *_with_classes(list(words))])
    except UnknownOptionError as error:
        raise CommandError(f"{error}{_HINT}") from None
    finally:
        sys.path[:] = before


class PlanCLI(MapCLI):
    """``lightning-gap fit`` that stops before the first update, on one process, and writes nothing."""

    def __init__(self, words: Sequence[str]) -> None:
        options: dict[str, Any] = {"save_config_callback": None}
        if names_a_class(words, "model"):
            # As LightningCLI itself: any module, and an optimizer from the configuration for one that makes none.
            options |= {"model_class": LightningModule, "auto_configure_optimizers": True}
            if not _gives_data(words):
                options["datamodule_class"] = None  # the module has its own
        if names_a_class(words, "data"):
            options["datamodule_class"] = LightningDataModule
        super().__init__(words, **options)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words; a plan is of the whole run, so no checkpoint is read."""
        self.config = parser.parse_args(args)
        self._path = self._checkpoint = self.config[self.config.subcommand]["ckpt_path"] = None

    def before_instantiate_classes(self) -> None:
        """Take one CPU for all devices, and no logger."""
        super().before_instantiate_classes()
        trainer = self._given("trainer")
        self._replicas = _replicas(trainer)
        accumulate = (trainer.get("accumulate_grad_batches") or 1) * self._replicas
        one = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
        silent = {"logger": False, "profiler": None, "plugins": None, "sync_batchnorm": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        for key, value in {**one, **silent, **quiet, "accumulate_grad_batches": accumulate}.items():
            trainer[key] = value

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


def _gives_data(words: Sequence[str]) -> bool:
    files = [loaded(words[at + 1]) for at, word in enumerate(words[:-1]) if word in ("--config", "-c")]
    given = any(isinstance(settings, dict) and settings.get("data") for settings in files)
    return given or any(word.startswith("--data") for word in words)


def _with_classes(words: list[str]) -> list[str]:
    """Give the arguments in a file to the classes that ``--model`` and ``--data`` name, if it names none."""
    words = [part for word in words for part in (word.split("=", 1) if _OPTION.match(word) else [word])]
    options = {option: at + 1 for at, option in enumerate(words[:-1]) if option in ("--config", "-c", *_PARTS)}
    place = options.get("--config", options.get("-c"))
    if place is None:
        return words
    try:
        settings = yaml.safe_load(Path(words[place]).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return words  # said by the parser
    given = settings if isinstance(settings, dict) else {}
    for option, part in _PARTS.items():
        arguments = given.get(part) or {}
        if option in options and isinstance(arguments, dict) and "class_path" not in arguments:
            given[part] = {"class_path": words[options[option]], "init_args": arguments}
            words[options[option] - 1 : options[option] + 1] = ["", ""]
            words[place] = json.dumps(given)
    return [word for word in words if word]
