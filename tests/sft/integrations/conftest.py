"""A stand-in for axolotl: the names of its public interface that the plug-in builds on."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
from transformers import Trainer


@dataclass(frozen=True)
class Capabilities:
    """What a plug-in says of an adapter."""

    name: str
    lora_like: bool = False
    relora: bool = False


class Plugin:
    """A plug-in that does nothing."""


class Preferences(Trainer):
    """A trainer by another name."""


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in as axolotl makes it."""
    base, trainers = ModuleType("axolotl.integrations.base"), ModuleType("axolotl.core.trainers")
    base.AdapterCapabilities, base.BasePlugin = Capabilities, Plugin
    trainers.AxolotlTrainer, trainers.AxolotlDPOTrainer = Trainer, Preferences
    packages = ("axolotl", "axolotl.integrations", "axolotl.core")
    for module in (*map(ModuleType, packages), base, trainers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("axolotl", "axolotl_trainers"):
        monkeypatch.delitem(sys.modules, f"sft.integrations.{name}", raising=False)
    made = importlib.import_module("sft.integrations.axolotl").SparsePlugin()
    yield made
    for name in ("axolotl", "axolotl_trainers"):  # made over the stand-in
        sys.modules.pop(f"sft.integrations.{name}", None)
