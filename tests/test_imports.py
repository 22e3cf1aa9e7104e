"""Importing is cheap: counted in modules, since seconds depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# what help may load: typer and what it reads arguments and draws with
COMMAND_LINE = {
    "typer", "click", "shellingham", "annotated_doc", "annotated_types", "typing_extensions",
    "pydantic", "pydantic_core", "typing_inspection", "rich", "pygments", "markdown_it", "mdurl",
    "attr",  # rich draws its classes, where jsonschema brought it along
}  # fmt: skip


def loaded(before: str, then: str) -> set[str]:
    """Names of the modules that `then` loads in a new process in which `before` has run."""
    code = f"""
import sys
{before}
known = set(sys.modules)
try:
    {then}
except SystemExit:
    pass
import json
print("\\n" + json.dumps(sorted(set(sys.modules) - known)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def foreign(modules: set[str]) -> set[str]:
    """Top-level names outside the standard library and the package."""
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"sft"}


def test_the_package_alone_loads_nothing_but_itself():
    found = loaded("", "import sft")
    assert {name for name in found if name.startswith("sft")} == {"sft", "sft._peft_hook"}
    # what the standard library brings depends on the Python
    assert {name for name in foreign(found) if not name.startswith("_")} == set()


@pytest.mark.parametrize("words", ["--help", "train --help", "recipes show quickstart"])
def test_help_loads_the_command_line_and_nothing_else(words):
    found = loaded(f"sys.argv = ['sft', *{words.split()}]", "import sft.cli; sft.cli.main()")
    assert {name for name in foreign(found) if not name.startswith("_")} <= COMMAND_LINE
    own = {name for name in found if name.startswith("sft")}
    own = {name for name in own if not name.startswith("sft.commands")}
    assert own <= {
        "sft", "sft._peft_hook", "sft.cli", "sft.errors", "sft.recipe", "sft.recipe.shipped",
    }  # fmt: skip


def test_recipes_are_listed_without_a_library_that_trains():
    found = loaded("sys.argv = ['sft', 'recipes']", "import sft.cli; sft.cli.main()")
    assert foreign(found) & {"torch", "transformers", "peft", "trl", "datasets", "numpy"} == set()


def test_methods_and_trainer_load_only_our_modules_over_transformers_and_peft():
    """So a script that has imported these waits for our own small files alone."""
    names = "SpielConfig", "S2FTConfig", "SoRAConfig", "SLTrainConfig", "SparseTrainer", "resident"
    then = f"import sft; [getattr(sft, name) for name in {names}]"
    found = loaded("import transformers, peft; from transformers import Trainer", then)
    assert {name for name in found if not name.startswith("sft")} == set()
    assert "sft.adapters.methods.spiel" in found
    assert {name for name in found if name.startswith("sft.kernels.triton")} == set()
