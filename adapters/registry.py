"""Methods register with PEFT by existing: one file each under `methods/`."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, cast

import sft.adapters.methods as family

if TYPE_CHECKING:
    from peft import PeftConfig


def method_names() -> list[str]:
    """Return the names of all methods on disk."""
    return sorted(module.name for module in pkgutil.iter_modules(family.__path__))


def config_class(name: str) -> type[PeftConfig]:
    """Return the PeftConfig subclass of a method.

    Raises:
        ValueError: there is no such method.
    """
    if name not in method_names():
        raise ValueError(f"method.name: got {name!r}, allowed are {', '.join(method_names())}")
    return cast("type[PeftConfig]", _module(name).Config)


def register_all() -> None:
    """Make every method known to `peft.get_peft_model` and `PeftModel.from_pretrained`."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    for name in method_names():
        if name.upper() not in PEFT_TYPE_TO_CONFIG_MAPPING:
            _extend_peft_type(name.upper())
            module = _module(name)
            register_peft_method(
                name=name,
                config_cls=module.Config,
                model_cls=module.Model,
                prefix=module.Model.prefix,
            )


def _module(name: str) -> ModuleType:
    # PEFT first: registration follows its import, and would meet a method that is half imported
    importlib.import_module("peft")
    return importlib.import_module(f"{family.__name__}.{name}")


def _extend_peft_type(name: str) -> None:
    """Add a member to PEFT's enum of methods: there is no public way for a package of its own."""
    from peft import PeftType

    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
