"""Every private name of another package that this one touches, a function each; nothing else touches one.

Each says which name is gone where a version of its package has it no more, or does without it. None of these modules
imports Lightning before a function is called, so the pure core may use them.
"""

__all__: list[str] = []
