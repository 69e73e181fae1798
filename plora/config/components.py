"""Objects named by dotted paths in the configuration: ``_component_: package.module.name``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

COMPONENT = "_component_"


def resolve(dotted: str) -> Any:
    """The object called ``dotted``.

    Raises:
        ValueError: if there is none; the message names the part that is missing.
    """
    module_name, _, name = dotted.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"there is no module {error.name!r} here: install its package, or run from the folder that holds it"
        ) from error
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), n=1)
        raise ValueError(f"{module_name} has no {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return getattr(module, name)


def instantiate(settings: Mapping[str, Any], **extra: Any) -> Any:
    """What ``settings``' component returns for its other keys and ``extra``.

    Raises:
        ValueError: if there is no such component, or it does not take these arguments.
    """
    arguments = {key: value for key, value in settings.items() if key != COMPONENT}
    component = resolve(settings[COMPONENT])
    try:
        return component(**arguments, **extra)
    except TypeError as error:
        raise ValueError(f"{settings[COMPONENT]} does not accept {sorted({*arguments, *extra})}: {error}") from error


def package_problem(dotted: str) -> str | None:
    """What is wrong with ``dotted`` as far as can be told without importing it, or None.

    Importing a data set's or a tracker's package may take longer than everything else here.
    """
    package = dotted.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"there is no package {package!r} here: install it, or run from the folder that holds it"
    return None
