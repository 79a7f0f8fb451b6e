"""LightningCLI over :class:`~lightning_gap.MongeMap` and :class:`~lightning_gap.SamplesDataModule`."""

import argparse
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import numpy as np
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# Imported so that their short names are known.
from lightning_gap import (
    GhostBatchNorm,  # noqa: F401
    GradientNoiseScale,  # noqa: F401
    LargeBatchRegime,  # noqa: F401
    MapFigure,  # noqa: F401
    MongeMap,
    SamplesDataModule,
    UltraSlowDiffusion,  # noqa: F401
)
from lightning_gap.commands import TRAINER_COMMANDS
from lightning_gap.commands.parsing import CommandError
from lightning_gap.monge.checkpoint_files import read_checkpoint
from lightning_gap.monge.transport_files import load_map
from lightning_gap.trainer.terminal import say

__all__ = ["MapCLI", "UnknownOptionError", "loaded", "names_a_class", "run_cli", "run_trainer", "trainer_parsers"]

DEFAULT_UPDATES = 5000
# At most this many validations of a run whose length is a number of updates.
_VALIDATIONS = 20
# What the user gave is wrong, if one of these packages says so. Anything else is a fault of a program, whose traceback
# someone needs.
_USERS = (ValueError, TypeError, OSError, ModuleNotFoundError, MisconfigurationException)
_SPEAKING = {"lightning_gap", "lightning", "jsonargparse"}


def run_trainer(words: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``."""
    run_cli(MapCLI, words)


def run_cli(cli: "type[MapCLI]", words: Sequence[str]) -> None:
    """Run a LightningCLI, and say in one line what its user did wrong."""
    try:
        cli(words)
    except _USERS as error:
        if not isinstance(error, MisconfigurationException | OSError) and _package(error) not in _SPEAKING:
            raise
        # jsonargparse tells what each of several types says of a value; the first is the one that is meant.
        raise CommandError(_flat(str(_reason(error) if _package(error) == "jsonargparse" else error))) from None
    except RuntimeError as error:
        if _frame(error).f_code is not torch.nn.Module.load_state_dict.__code__:
            raise
        raise CommandError(
            "the checkpoint has the weights of another network than the one that is described: describe the same, or "
            "leave out all of --model and have the checkpoint's"
        ) from None


def _frame(error: BaseException) -> FrameType:
    """Return the frame that raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame


def _reason(error: BaseException) -> BaseException:
    """Return the error of which an error was made."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _package(error: BaseException) -> str:
    """Return the package whose code raised an error."""
    return str(_frame(error).f_globals.get("__name__", "")).partition(".")[0]


def trainer_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    parsers: dict[str, argparse.ArgumentParser] = {}

    class Made(Exception):  # noqa: N818
        """LightningCLI makes its parsers and runs in one: it goes no further than this."""

    class Maker(MapCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            parsers.update(self.parsers)
            raise Made

    with suppress(Made):
        Maker([])
    return parsers


class UnknownOptionError(CommandError):
    """A configuration has what the classes it describes do not take."""


class MapCLI(LightningCLI):
    """``lightning-gap fit``, ``validate``, ``test`` and ``predict``.

    A model or data module that is another class than :class:`MongeMap` or :class:`SamplesDataModule` is given by
    ``class_path``, and its arguments by ``init_args``; without, arguments are given directly.
    """

    def __init__(self, words: Sequence[str], **options: Any) -> None:
        # Each parser takes a second to make, and one is wanted; all of them where no command is named.
        asked = [name for name in TRAINER_COMMANDS if not words or name == words[0]]
        skipped = {name: LightningCLI.subcommands()[name] for name in asked}
        self.subcommands = lambda: skipped  # type: ignore[method-assign]
        texts = {name: TRAINER_COMMANDS[name] for name in asked}
        commands = {name: {"description": f"{text[0].upper()}{text[1:]}."} for name, text in texts.items()}
        self.parsers: dict[str, LightningArgumentParser] = {}
        super().__init__(
            seed_everything_default=0,
            parser_kwargs={
                "prog": "lightning-gap",
                "description": "Transport maps.",
                "allow_abbrev": False,
                **commands,
            },
            parser_class=_Parser,
            subclass_mode_model=names_a_class(words, "model"),
            subclass_mode_data=names_a_class(words, "data"),
            args=list(words),
            # A MongeMap's own hyper-parameters make it again.
            load_from_checkpoint_support=False,
            **{
                "model_class": MongeMap,
                "datamodule_class": SamplesDataModule,
                "save_config_callback": _SaveConfig,
                "auto_configure_optimizers": False,
                **options,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keep the parser of a command; Lightning asks once for each, in their order."""
        self.parsers[list(self.subcommands())[len(self.parsers)]] = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words, whatever those of the process are, and read the checkpoint before anything else.

        Lightning, which would take the checkpoint's settings here, sees it later: see ``instantiate_classes``.
        """
        self.config = parser.parse_args(args)
        self._path, self._checkpoint = self._given("ckpt_path"), None
        if self._path and self._path not in ("best", "last", "hpc", "registry") and "://" not in str(self._path):
            read_checkpoint(self._path)
            self._checkpoint = self._path
        self.config[self.config.subcommand]["ckpt_path"] = None

    def before_instantiate_classes(self) -> None:
        """Give the run a length, and validations, where it has none; a checkpoint is no program."""
        settings = self.config[self.subcommand]
        settings["ckpt_path"] = self._path
        if "weights_only" in settings and settings["weights_only"] is None:
            # Lightning would run what it finds at a URL.
            settings["weights_only"] = True
        self._length_is_ours = self.subcommand == "fit" and _set_length(self._given("trainer"))

    def instantiate_classes(self) -> None:
        """Make the data module, the model and the trainer; the model is the checkpoint's where none is described."""
        defaults = self.parsers[str(self.subcommand)].get_defaults(skip_validation=True)
        described = self.subclass_mode_model or self._given("model") != defaults.get("model")
        super().instantiate_classes()
        if self._checkpoint is not None and not described:
            try:
                self.model = load_map(self._checkpoint)
                if self.subcommand != "fit":
                    # It has its weights. Loaded once more, it would bring the state of callbacks that are not here.
                    self.config_init[self.subcommand]["ckpt_path"] = None
            except MisconfigurationException as error:
                raise CommandError(f"--ckpt_path {self._checkpoint}: {error}; here by --config or --model.*") from None

    def before_fit(self) -> None:
        """Say how long the run is, where the user did not."""
        if self._length_is_ours:
            say(f"No length is given: training for {DEFAULT_UPDATES} updates; set --trainer.max_steps or .max_epochs")

    def after_fit(self) -> None:
        """Say where the map is, and save it where a run without validations has not."""
        callback = self.trainer.checkpoint_callback
        if not isinstance(callback, ModelCheckpoint) or cast(Any, self.trainer).fast_dev_run:
            return
        saved = callback.best_model_path or callback.last_model_path
        if not saved and callback.save_top_k != 0:
            # Where validations are counted in updates Lightning saves after them, and without one never.
            saved = _checkpoint_of_the_end(callback, self.trainer)
            self.trainer.save_checkpoint(saved)
        if saved:
            say(f"checkpoint: {saved}")

    def predict(self, **options: Any) -> None:
        """Map all source samples of the data, and write the images beside the logs."""
        if self.trainer.world_size > 1:
            raise CommandError(
                f"predict on {self.trainer.world_size} devices would give each a part of the samples: use "
                "--trainer.devices=1, or lightning-gap transport"
            )
        parts = self.trainer.predict(**{**options, "return_predictions": True})
        mapped = torch.cat([part for part in parts or [] if isinstance(part, torch.Tensor)]).cpu()
        images = (mapped.float() if mapped.dtype == torch.bfloat16 else mapped).numpy()
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = _free(folder / "predictions.npy")
        np.save(path, images)
        say(f"{len(images)} rows mapped to {path}")

    def _given(self, key: str) -> Any:
        """Return a setting of the command that runs."""
        return self.config[self.config.subcommand].get(key)


class _Parser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say of a value that fits no type of several what the first of them says, and of all else the whole."""
        reason = _flat(str(_reason(ex))) if ex is not None else ""
        if not _flat(message).endswith(reason):
            message = f"{message.lstrip().splitlines()[0]} {reason}"
        raise (UnknownOptionError if isinstance(ex, KeyError) else CommandError)(_flat(message)) from None


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration beside the logs, and overwrites none."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "overwrite": True})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it under a name that is free."""
        log_dir = trainer.log_dir  # asked by every process: it is broadcast
        if trainer.is_global_zero and log_dir is not None:
            self.config_filename = _free(Path(log_dir, self.config_filename)).name
        super().setup(trainer, pl_module, stage)


def _checkpoint_of_the_end(callback: ModelCheckpoint, trainer: Trainer) -> str:
    """Return the path that a callback would save to now; it overwrites none."""
    metrics = {**trainer.callback_metrics, "epoch": torch.tensor(trainer.current_epoch)}
    metrics["step"] = torch.tensor(trainer.global_step)
    path = callback.format_checkpoint_name(metrics)
    version = callback.STARTING_VERSION
    while callback.file_exists(path, trainer):
        path = callback.format_checkpoint_name(metrics, ver=version)
        version += 1
    return path


def _free(path: Path) -> Path:
    """Return the path, or else its first version that does not exist."""
    found, version = path, 0
    while found.exists():
        version += 1
        found = path.with_stem(f"{path.stem}-v{version}")
    return found


def _set_length(trainer: Any) -> bool:
    """Set the number of updates where no length is given, validate a few times in it, and return whether it was."""
    without = not trainer.get("fast_dev_run") and all(
        trainer.get(key) in (None, -1) for key in ("max_steps", "max_epochs", "max_time")
    )
    if without:
        trainer["max_steps"] = DEFAULT_UPDATES
    steps = trainer.get("max_steps")
    if (
        isinstance(steps, int)
        and steps > 0
        and trainer.get("max_epochs") in (None, -1)
        and trainer.get("val_check_interval") is None
        and trainer.get("check_val_every_n_epoch") == 1
    ):
        # An epoch of a few batches would spend the run on validations. The last one, and its checkpoint, is at the end.
        validations = next(n for n in range(_VALIDATIONS, 0, -1) if steps % n == 0)
        trainer["val_check_interval"] = steps // validations
        trainer["check_val_every_n_epoch"] = None
    return without


def names_a_class(words: Sequence[str], part: str) -> bool:
    """Return whether words or the configuration files among them give a part by its class."""
    found = False
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not equals:
            value = words[i + 1] if i + 1 < len(words) else ""
        if option in ("-c", "--config", f"--{part}"):
            settings = loaded(value)
            given = settings.get(part) if option in ("-c", "--config") and isinstance(settings, dict) else settings
            if isinstance(given, str) and Path(given).is_file():
                given = loaded(given)
            found |= isinstance(given, str) or (isinstance(given, dict) and "class_path" in given)
        found |= option == f"--{part}.class_path"
    return found


def loaded(value: str) -> Any:
    """Return what a file of YAML holds, or the words themselves do; None where it cannot be read."""
    try:
        is_file = not value.startswith("{") and Path(value).is_file()
        return yaml.safe_load(Path(value).read_text(encoding="utf-8") if is_file else value)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # said by the parser, which knows the option


def _flat(text: str) -> str:
    return " ".join(text.split())
