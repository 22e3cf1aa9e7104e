"""`sft diff`: compare two changes of one base, or a model with its base."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from sft.export.delta import is_delta
from sft.tools.compare import compare
from sft.tools.describe import describe_changes
from sft.tools.found import Changes, ModelChanges, find_changes
from sft.tools.opened import is_adapter
from sft.tools.show import show_comparison, show_description


def run(first: str, second: str, *, base: str | None, modules: bool, as_json: bool) -> None:
    """Print how two targets differ.

    Args:
        first: an adapter, run, delta, or model.
        second: another one, or the base of a model.
        base: what models are compared with; default: the base of the other one.
        modules: print every module.
        as_json: print data alone.
    """
    if base is None and not _names_base(first) and not _names_base(second):
        found = describe_changes(ModelChanges(first, second, keys=("A", "B")))
        if as_json:
            print(json.dumps({"first": first, "second": second, **found}, indent=2))
        else:
            show_description(Console(), first, found, modules=modules)
        return
    one, other = _both(first, second, base)
    compared = compare(one, other)
    if as_json:
        names = {"targets": [first, second], "bases": [one.base, other.base]}
        print(json.dumps({**names, **compared}, indent=2))
    else:
        show_comparison(Console(), (first, second), compared, modules=modules)


def _both(first: str, second: str, base: str | None) -> tuple[Changes, Changes]:
    """Return both changes; a model's is from the base of the other one."""
    if base is None and not _names_base(first):
        other = find_changes(second)
        return find_changes(first, other.base), other
    one = find_changes(first, base)
    known = base if _names_base(second) else base or one.base
    return one, find_changes(second, known)


def _names_base(target: str) -> bool:
    """Tell whether a target says what it is a change of: an adapter, a delta, a run of one."""
    folder = Path(target).expanduser()
    return is_delta(folder) or is_adapter(folder)
