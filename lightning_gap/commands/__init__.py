"""The commands of ``lightning-gap``: one module each, with ``add(commands)`` and, behind it, what the command does.

A module imports nothing heavy at its top, so that ``lightning-gap --help`` answers at once.
"""

__all__ = ["COMMANDS"]

# In the order of the help.
COMMANDS = ("trainer", "transport", "demo", "plan", "report", "dashboard", "completion")
