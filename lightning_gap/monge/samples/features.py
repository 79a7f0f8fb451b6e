"""Features by their names, wherever samples come from: which column is which."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray

__all__ = ["columns_like", "feature_places", "listed", "match_features", "names_of"]

Array = NDArray[Any]


def feature_places(
    title: str,
    given: Sequence[str] | None,
    wanted: Sequence[str] | None,
    whose: str,
    *,
    remedy: str = "",
    warns: bool = True,
) -> Array | None:
    """Return the ``(d,)`` places of wanted features among given ones; ``None`` where they stand so already.

    Sets of which one has no names go together by place. What is given and not wanted is warned of, unless ``warns`` is
    false; what is missing raises, with the ``remedy``. ``title`` and ``whose`` are how messages call what has the given
    and the wanted ones.
    """
    if given is None or wanted is None or tuple(given) == tuple(wanted):
        return None
    place = {name: i for i, name in enumerate(given)}
    missing = [name for name in wanted if name not in place]
    if missing:
        raise ValueError(
            f"{title} has no {listed(missing)}, which {whose} has among its features ({listed(wanted)}); it has "
            f"{listed(given)}" + (f": {remedy}" if remedy else ": rename or add the columns")
        )
    known = set(wanted)
    repeated = _repeated(wanted) or _repeated([name for name in given if name in known])
    if repeated is not None:
        raise ValueError(
            f"the feature {repeated!r} of {title} or {whose} is there twice, and the others stand in another order: "
            "give each a name of its own, as by adata.var_names_make_unique()"
        )
    extra = [name for name in given if name not in known]
    if extra and warns:
        rank_zero_warn(f"{title} has {listed(extra)}, which {whose} does not know: ignored")
    return np.array([place[name] for name in wanted])


def match_features(data: Any, names: Sequence[str] | None) -> None:
    """Have a data module give its features in a map's order; one without names goes by place."""
    theirs = getattr(data, "feature_names", None)
    if names is None or theirs is None or list(map(str, theirs)) == list(names):
        return
    match = getattr(data, "match_features", None)
    if not callable(match):
        raise MisconfigurationException(
            f"the features of the data are {listed(theirs)}, and those of the map {listed(names)}: give the data "
            "module the same ones in the same order"
        )
    try:
        match(names)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def names_of(data: Any) -> tuple[str, ...] | None:
    """Return the names of a data frame's columns as text, of whichever library; ``None`` for anything else."""
    columns = getattr(data, "columns", None)
    return None if columns is None or callable(columns) else tuple(map(str, columns))


def columns_like(title: str, data: Any, like: Any, whose: str) -> Any:
    """Return a data frame with the columns of another, in its order; anything else, and without names, as it is."""
    given, wanted = names_of(data), names_of(like)
    numbered = any(
        names is not None and list(names) == [str(i) for i in range(len(names))] for names in (given, wanted)
    )
    if numbered and set(given or ()) != set(wanted or ()):
        return data  # Numbers that pandas has given are no names.
    remedy = f"to go by place, give an array, {title}.to_numpy()"
    places = feature_places(title, given, wanted, whose, remedy=remedy)
    return data if places is None else data[[data.columns[i] for i in places]]


def listed(names: Iterable[Any], most: int = 5) -> str:
    """Return the first names, and how many there are."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:most]) + (f", ... ({len(shown)} in all)" if len(shown) > most else "")


def _repeated(names: Sequence[str]) -> str | None:
    if len(set(names)) == len(names):
        return None
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
