"""LightningCLI over :class:`~lightning_gap.MongeMap` and :class:`~lightning_gap.SamplesDataModule`."""

import argparse
import re
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
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
from lightning_gap.commands.parsing import CommandError
from lightning_gap.commands.trainer import TRAINER_COMMANDS
from lightning_gap.monge.checkpoint_files import read_checkpoint
from lightning_gap.monge.transport_files import load_map
from lightning_gap.trainer.terminal import say

__all__ = ["MapCLI", "loaded", "names_a_class", "run_cli", "run_trainer", "trainer_parsers"]

DEFAULT_UPDATES = 5000
# At most this many validations of a run whose length is a number of updates.
_VALIDATIONS = 20
# What the user gave is wrong. Anything else is a fault of a program, whose traceback someone needs.
_USERS = (ValueError, TypeError, OSError, ModuleNotFoundError, MisconfigurationException)


def run_trainer(words: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        words: The command and its options.

    Raises:
        CommandError: Something is wrong with them, or with what they name.
    """
    run_cli(MapCLI, words)


def run_cli(cli: "type[MapCLI]", words: Sequence[str]) -> None:
    """Run a LightningCLI, and say in one line what its user did wrong.

    Args:
        cli: Its class.
        words: The command and its options.

    Raises:
        CommandError: Something is wrong with them, or with what they name.
    """
    try:
        cli(words)
    except _USERS as error:
        if not _expected(error):
            raise
        raise CommandError(_one_line(str(error))) from None
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        raise CommandError(
            "the checkpoint has the weights of another network than the one that is described: describe the same, or "
            "leave out all of --model and have the checkpoint's"
        ) from None


def trainer_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    parsers: dict[str, argparse.ArgumentParser] = {}

    class Made(Exception):  # noqa: N818
        """LightningCLI makes its parsers and runs in one: it goes no further than this."""

    class Maker(MapCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            parsers.update(self._subcommand_parsers)
            raise Made

    with suppress(Made):
        Maker([])
    return parsers


def _expected(error: BaseException) -> bool:
    """Return whether an error was raised on purpose, by this package or Lightning, or by the file system."""
    if isinstance(error, MisconfigurationException | OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    source = frames[-1].line or "" if frames else ""
    file = Path(frames[-1].filename).parts if frames else ()
    return bool({"lightning_gap", "lightning", "jsonargparse"} & set(file)) and source.lstrip().startswith("raise")


class MapCLI(LightningCLI):
    """``lightning-gap fit``, ``validate``, ``test`` and ``predict``.

    A model or data module that is another class than :class:`MongeMap` or :class:`SamplesDataModule` is given by
    ``class_path``, and its arguments by ``init_args``; without, arguments are given directly.

    Args:
        words: The command and its options.
        options: Arguments of ``LightningCLI`` that are to be others than here.
    """

    def __init__(self, words: Sequence[str], **options: Any) -> None:
        commands = {name: {"description": f"{what[0].upper()}{what[1:]}."} for name, what in TRAINER_COMMANDS.items()}
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words, whatever those of the process are."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Read the checkpoint before anything else; its settings are taken where the model has none: see below."""
        path = self._given("ckpt_path")
        self._checkpoint = None
        if path and path not in ("best", "last", "hpc", "registry") and "://" not in str(path):
            read_checkpoint(path)
            self._checkpoint = path

    def before_instantiate_classes(self) -> None:
        """Give the run a length, and validations, where it has none; a checkpoint is no program."""
        if "weights_only" in self.config[self.subcommand] and self._given("weights_only") is None:
            # Lightning would run what it finds at a URL.
            self.config[self.subcommand]["weights_only"] = True
        self._length_is_ours = self.subcommand == "fit" and _set_length(self._given("trainer"))

    def instantiate_classes(self) -> None:
        """Make the data module, the model and the trainer; the model is the checkpoint's where none is described."""
        defaults = self._parser(self.subcommand).get_defaults(skip_validation=True)
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
        """Map all source samples of the data, and write the images beside the logs.

        Args:
            **options: Arguments of ``Trainer.predict``.

        Raises:
            CommandError: Several devices would each map a part.
        """
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
        raise CommandError(_one_line(message)) from None


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
    """Set the number of updates where no length is given; validate a few times in a run of so many updates.

    Returns:
        Whether no length was given.
    """
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


def _one_line(message: str) -> str:
    """Return what a parser says in one line: which option, what is wrong, and what would be right."""
    if message.startswith("the following arguments are required"):
        message = re.sub(r"\b(?:fit|validate|test|predict)\.(?=[a-z])", "--", message)
    found = re.match(r'(?:Parser key "(?P<key>[^"]+)":\s*)?(?P<said>.*)', message, re.DOTALL)
    if found is None or (found["key"] is None and "any of the Union subtypes" not in message):
        return _flat(message)
    said, given = found["said"], re.search(r"\n\s*Given value: (.*)", found["said"], re.DOTALL)
    errors = re.search(r"Errors:\n(?P<indent> *)- (?P<all>.*?)(?:\n\s*Given value type:|$)", said, re.DOTALL)
    kinds, reasons = [], []
    for error in [said] if errors is None else re.split(rf"\n{errors['indent']}- ", errors["all"]):
        kind = _kind(error)
        if kind is None:
            reasons.append(_flat(error))
        elif kind:
            kinds.append(kind)
    given = given or re.search(r"\. Got value: (.*)", said)
    value = repr(_shortened(_flat(given[1]))) if given is not None else "this"
    what = reasons[0] if reasons else f"{value} is no {', or '.join(dict.fromkeys(kinds))}"
    option = "" if found["key"] is None else f"--{found['key'].removeprefix('--')}: "
    return option + _shortened(what, 400)


def _kind(error: str) -> str | None:
    """Return what was expected where an error says no more than that, ``""`` where that is of no use."""
    if re.match(r"Expected a <class 'NoneType'>|Not a valid subclass of|Expected a path but", error):
        return ""
    if found := re.match(r"Expected a <class '(?:\w+\.)*(\w+)'>(?:\. Got value: .*)?$", error):
        return {"str": "text", "int": "whole number", "float": "number"}.get(found[1], found[1])
    if found := re.match(r"Expected a typing.Literal\[(.*)\]$", error):
        return f"one of {found[1]}"
    if error.startswith("Expected a dot import path string"):
        return "class or function known by that name: give its full path, as in package.module.Name"
    return None


def _flat(text: str) -> str:
    return " ".join(text.split())


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
