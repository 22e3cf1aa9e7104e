"""What `sft eval` and `sft chat` are pointed at: a run, an adapter, a delta, or a model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sft.class_names import read_labels
from sft.data.load import Examples
from sft.errors import UserError, one_line
from sft.export.delta import CONTENT, apply_delta, is_delta
from sft.models import load_config
from sft.quantization import as_trained, is_quantized
from sft.recipe.load import load_recipe
from sft.recipe.schema import ModelSpec, Recipe
from sft.run.folder import ADAPTER, MERGED, RECIPE, RECORD
from sft.tasks.find import build_task, has_classes, task_classes
from sft.tasks.task import Task
from sft.tools.opened import SETTINGS, find_adapter, read_settings


@dataclasses.dataclass(frozen=True)
class Target:
    """A model, and what is put on it.

    Args:
        name: as the user gave it.
        spec: the model, of an adapter or a delta its base.
        adapter: folder of the adapter, if any.
        delta: folder of the delta, if any.
        recipe: of the run it is from, if any.
        task: what it was trained to do.
    """

    name: str
    spec: ModelSpec
    adapter: Path | None = None
    delta: Path | None = None
    recipe: Recipe | None = None
    task: str = "sft"


def find_target(name: str, *, base: str | None = None, recipe: str | None = None) -> Target:
    """Find out what a name means; nothing is loaded.

    Args:
        name: folder of a run, an adapter, a delta or a model; or a model's hub or embedded name.
        base: of an adapter or a delta; default: what it names itself.
        recipe: whose model, data and task count; default: that of the run.

    Raises:
        UserError: there is no such thing, or it does not name its base.
    """
    folder = Path(name).expanduser()
    own = _recipe_of(folder) if recipe is None else load_recipe(recipe)
    place = _place(folder, own)
    if (place / SETTINGS).is_file():
        found = find_adapter(place)
        settings = read_settings(found)
        spec = _base(found, own, base or settings.get("base_model_name_or_path"), base)
        task = own.task["name"] if own else _task_of_type(settings.get("task_type"))
        return Target(name, spec, adapter=found, recipe=own, task=task)
    if is_delta(place):
        content = json.loads((place / CONTENT).read_text(encoding="utf-8"))
        spec = _base(place, own, base or content.get("model"), base)
        return Target(name, spec, delta=place, recipe=own, task=own.task["name"] if own else "sft")
    if base is not None:
        raise UserError(f"--base: got {base}, but {name} is a whole model; leave it out")
    spec = _whole(place, name, own)
    return Target(name, spec, recipe=own, task=own.task["name"] if own else _task_of_model(spec))


def task_of(target: Target) -> Task:
    """Return the task of a target; a whole classifier has the classes that it was saved with."""
    section = dict(target.recipe.task if target.recipe is not None else {"name": target.task})
    whole = target.adapter is None and target.delta is None and Path(target.spec.name).is_dir()
    name = section["name"]
    if target.recipe is None and target.adapter is not None and has_classes(task_classes()[name]):
        section["labels"] = read_labels(target.adapter)
    if whole and has_classes(task_classes()[name]) and _task_of_model(target.spec) == name:
        config = load_config(target.spec)
        if config.problem_type != "regression":
            section["labels"] = [config.id2label[i] for i in range(config.num_labels)]
    return build_task(section)


def open_target(
    target: Target, task: Task, data: Examples | None, device: str | None = None
) -> Any:
    """Load the model, and put on it what belongs on it.

    Args:
        target: of `find_target`.
        task: of `task_of`.
        data: what it was trained on, where a task needs that to load its model.
        device: where it goes; default: a GPU if there is one.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: it does not load, or a part of it is in no file.
    """
    import torch

    given: Any = data  # a language model's task reads none
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = task.load_model(target.spec, given, place)
    if target.delta is not None:
        apply_delta(model, target.delta)
    if target.adapter is not None:
        model = _adapted(model, target.adapter, target.spec.name)
    elif missing := getattr(task, "missing", []):
        raise UserError(
            f"{target.name}: holds no {missing[0]}, which would be random; train the model for "
            f"{task.name} first, or give the folder of a run"
        )
    return (model if is_quantized(model) else model.to(place)).eval()


def open_processor(target: Target, task: Task) -> Any:
    """Load the tokenizer or image processor: the one saved beside the adapter, if there is one."""
    spec, folder = target.spec, target.adapter
    saved = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    if folder is not None and any((folder / name).is_file() for name in saved):
        spec = spec.model_copy(update={"name": str(folder.absolute()), "revision": None})
    return task.load_processor(spec)


def trained_on(target: Target) -> str | None:
    """Return the format of the examples that a run was trained on, if its record tells."""
    folder = Path(target.name).expanduser()
    for path in (folder / RECORD, folder.parent / RECORD):
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get("data") or {}
            return found.get("format") if isinstance(found, dict) else None
    return None


def as_tuned(model: Any) -> AbstractContextManager[Any]:
    """Run an adapted model with the very weights that training used."""
    from sft.adapters.layer import sparse_layers
    from sft.adapters.resident import resident

    held = sparse_layers(model) and not is_quantized(model)
    return resident(model) if held else contextlib.nullcontext()


def _recipe_of(folder: Path) -> Recipe | None:
    """Return the recipe of the run that a folder is, or lies in."""
    inside = folder.parent if folder.name in (ADAPTER, MERGED) else folder
    path = inside / RECIPE
    return load_recipe(path) if path.is_file() else None


def _place(folder: Path, recipe: Recipe | None) -> Path:
    """Return the folder of a model, an adapter or a delta, in that of a run if it is one."""
    if not (folder / RECIPE).is_file():
        return folder
    random = recipe is not None and recipe.model.config is not None  # has no base beside it
    names = (MERGED, ADAPTER) if random else (ADAPTER, MERGED)
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        raise UserError(f"{folder}: holds neither {ADAPTER} nor {MERGED}; the run has not ended")
    return found


def _base(folder: Path, recipe: Recipe | None, name: str | None, given: str | None) -> ModelSpec:
    """Return the model under an adapter or a delta, loaded as it was for training."""
    if recipe is not None:
        update = {"config": None} | ({"name": given, "revision": None} if given else {})
        return recipe.model.model_copy(update=update)
    if not name:
        raise UserError(f"{folder}: does not name its base model; pass --base")
    return as_trained(folder, ModelSpec(name=name))


def _whole(place: Path, name: str, recipe: Recipe | None) -> ModelSpec:
    """Return a whole model: a folder as it was saved, a named one as the recipe loads its own."""
    if place.is_dir():
        return ModelSpec(name=str(place))
    if recipe is None:
        return ModelSpec(name=name)
    revision = recipe.model.revision if name == recipe.model.name else None
    return recipe.model.model_copy(update={"name": name, "revision": revision, "config": None})


def _adapted(model: Any, folder: Path, base: str) -> Any:
    """Put an adapter on; a pair that does not fit is refused with the reason."""
    from peft import PeftModel

    from sft.adapters import registry

    registry.register_all()
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise UserError(f"{folder}: does not fit {base}: {one_line(error)[:300]}") from error


def _task_of_type(kind: str | None) -> str:
    """Return the task whose adapters PEFT calls so."""
    found = (name for name, task in task_classes().items() if task.peft_type == kind)
    return next(found, "sft")


_TASK_OF_HEAD = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "masked-lm",
    "ForConditionalGeneration": "seq2seq",
}


def _task_of_model(spec: ModelSpec) -> str:
    """Return the task that a model's head is for."""
    names = getattr(load_config(spec), "architectures", None) or [""]
    ends = (task for end, task in _TASK_OF_HEAD.items() if names[0].endswith(end))
    found = next(ends, "sft")
    return found if found in task_classes() else "sft"
