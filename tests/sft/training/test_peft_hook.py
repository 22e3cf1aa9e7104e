"""`import sft` is light, and PEFT knows our methods in whatever order they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

# Stands in for PEFT (whose import takes seconds) and for our registry: records what happens when.
STAND_IN = """
import importlib, importlib.util, sys, types
sys.path.insert(0, {folder!r})
registry = types.ModuleType("sft.adapters.registry")
registry.register_all = lambda: events.append("registered")
sys.modules["sft.adapters.registry"] = registry
events = []
import builtins
builtins.events = events
"""

SETTLED = """
assert events == ["peft imported", "registered"], events
assert not any(type(finder).__name__ == "_PeftFinder" for finder in sys.meta_path)
import peft
assert "sft" not in type(peft.__loader__).__module__
assert peft.__spec__.loader is peft.__loader__
"""


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_sft_loads_nothing_heavy():
    heavy = "torch, transformers, peft, accelerate, trl, datasets, safetensors, numpy"
    python(
        f"""
        import sys, sft
        loaded = [name for name in {heavy.split(", ")} if name in sys.modules]
        assert not loaded, loaded
        """
    )


@pytest.mark.parametrize(
    "order",
    [
        "import sft, peft",
        "import peft, sft",
        "import sft\n"
        "assert importlib.util.find_spec('peft')\n"
        "assert 'peft' not in sys.modules and not events\n"
        "import peft",
        "import sft, peft.inner",
        "import sft\nimportlib.reload(sft)\nimport peft",
    ],
    ids=["sft-peft", "peft-sft", "looked-up-between", "by-a-submodule", "reloaded"],
)
def test_any_order_of_imports_registers_once(tmp_path, order):
    package = tmp_path / "peft"
    package.mkdir()
    (package / "__init__.py").write_text("events.append('peft imported')\n")
    (package / "inner.py").touch()
    python(STAND_IN.format(folder=str(tmp_path)) + order + SETTLED)


def test_a_peft_that_fails_to_import_fails_by_itself(tmp_path):
    (tmp_path / "peft.py").write_text("raise ImportError('broken on purpose')\n")
    python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import sft
        try:
            import peft
        except ImportError as error:
            assert str(error) == "broken on purpose", error
        else:
            raise AssertionError
        assert "peft" not in sys.modules
        """
    )


@pytest.fixture
def saved(lab):
    import torch

    base = lab.base()
    base.save_pretrained(lab.folder / "base")
    model = lab.adapted(base, init_weights=False)
    model.peft_config["default"].base_model_name_or_path = str(lab.folder / "base")
    model.save_pretrained(lab.folder / "adapter")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(8)[None]).logits
    torch.save(logits, lab.folder / "logits.pt")
    return lab.folder


def test_an_adapter_folder_loads_with_stock_peft_after_importing_sft(saved):
    python(
        f"""
        import importlib.util, sft, torch
        assert importlib.util.find_spec("peft")
        from sft import resident  # imports PEFT while a module of ours is half imported
        from pathlib import Path
        from peft import AutoPeftModelForCausalLM, PeftModel
        from transformers import AutoModelForCausalLM
        folder = Path({str(saved)!r})
        expected = torch.load(folder / "logits.pt", weights_only=True)

        def check(model):
            with torch.no_grad():
                assert torch.equal(model.eval()(input_ids=torch.arange(8)[None]).logits, expected)

        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        check(PeftModel.from_pretrained(base, folder / "adapter"))
        check(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"))
        """
    )
