from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sft.adapters import registry

FIRST_IMPORTS = [
    "from sft import SpielConfig",
    "import sft.adapters.registry",
    "from sft.adapters.methods.spiel import SpielConfig",
    "from sft.adapters.resident import sparse_layers",
    "from sft.adapters import registry; registry.config_class('spiel')",
]


# a fresh process that has what PEFT imports, but not PEFT; each order is tried in a fork of it
FORKS = """
import os, sys
import accelerate.utils, torch, transformers.modeling_utils, transformers.pytorch_utils
from torch import nn
assert "peft" not in sys.modules
failed = []
for first in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(first)
        from peft import get_peft_model
        from sft import SpielConfig
        config = SpielConfig(density=0.5, target_modules=["0"])
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(first)
print(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_methods_are_registered_whatever_is_imported_first() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, *FIRST_IMPORTS], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.name: got 'lora', allowed are .*spiel"):
        registry.config_class("lora")


def test_registering_twice_changes_nothing() -> None:
    from peft import PeftType

    registry.register_all()
    before = list(PeftType)
    registry.register_all()
    assert list(PeftType) == before
    assert PeftType("SPIEL") is PeftType.SPIEL
