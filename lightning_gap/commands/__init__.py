"""The commands of ``lightning-gap``: one module each, with ``add(commands)`` and, behind it, what the command does.

A module imports nothing heavy at its top, so that ``lightning-gap --help`` answers at once.
"""

__all__ = ["COMMANDS", "TRAINER_COMMANDS"]

# In the order of the help.
COMMANDS = ("trainer", "transport", "demo", "plan", "report", "dashboard", "completion")
# Those of LightningCLI, which has the options.
TRAINER_COMMANDS = {
    "fit": "train a transport map on files of samples",
    "validate": "score a map on the samples held out for validation",
    "test": "score a map on the samples held out for the test",
    "predict": "map all source samples of the data",
}
