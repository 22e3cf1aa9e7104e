"""A saved adapter over a base of shapes: every method's own code reads it, no base is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.adapters import registry
from sft.class_names import read_labels
from sft.errors import UserError, one_line
from sft.models import load_config, locate
from sft.recipe.schema import ModelSpec
from sft.tools.change import Change, change_of

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"

# What PEFT's task types put on a model.
_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Opened:
    """An adapter in memory, its base on disk.

    Args:
        model: a PeftModel; its base has shapes and no weights.
        adapter: the adapter's name in it.
        base: what it was trained on: hub id, folder or embedded name.
        folder: where it was read from, or None.
    """

    model: Any
    adapter: str = NAME
    base: str = ""
    folder: Path | None = None

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.config.peft_type.value.lower())

    @property
    def config(self) -> Any:
        """The adapter's settings."""
        return self.model.peft_config[self.adapter]

    def layers(self) -> dict[str, Any]:
        """Return the layers that carry the adapter, by their names in the base model."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {
            name: module
            for name, module in self.model.get_base_model().named_modules()
            if isinstance(module, BaseTunerLayer) and self._carries(module)
        }

    def change(self, name: str) -> Change:
        """Return what the adapter changes of one weight."""
        return change_of(self.layers()[name], self.adapter)

    def whole(self) -> dict[str, nn.Parameter]:
        """Return what is trained and saved densely beside the method: heads and the like."""
        mark = f".modules_to_save.{self.adapter}"
        named = self.model.get_base_model().named_parameters()
        return {name.replace(mark, ""): p for name, p in named if mark in name}

    def _carries(self, module: Any) -> bool:
        return any(self.adapter in getattr(module, part, ()) for part in module.adapter_layer_names)


def find_adapter(folder: Path) -> Path:
    """Return the folder of an adapter: the one given, or the one in the folder of a run.

    Raises:
        UserError: neither holds one, or not all of it.
    """
    places = [folder, folder / "adapter"]
    found = next((place for place in places if (place / SETTINGS).is_file()), None)
    if found is None:
        what = (
            "holds neither an adapter nor a run with one" if folder.is_dir() else "no such folder"
        )
        raise UserError(f"{folder}: {what}; give the folder that {SETTINGS} lies in")
    if not (found / TENSORS).is_file():
        raise UserError(f"{found}: no {TENSORS} in it; it was not saved whole")
    return found


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder is that of an adapter, or of a run with one."""
    return any((place / SETTINGS).is_file() for place in (folder, folder / "adapter"))


def read_settings(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SETTINGS}: does not read ({one_line(error)[:200]})") from error
    if not isinstance(found, dict):
        raise UserError(f"{folder / SETTINGS}: got {type(found).__name__}, allowed is an object")
    return found


def open_adapter(folder: Path, base: str | None = None) -> Opened:
    """Read an adapter over the shapes of its base.

    Args:
        folder: of the adapter, or of a run.
        base: hub id, folder or embedded name, of which the configuration is read; default: what
            the adapter names.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    registry.register_all()
    place = find_adapter(folder)
    settings = read_settings(place)
    name = base or settings.get("base_model_name_or_path") or ""
    if not name:
        raise UserError(f"{place}: does not name its base model; pass --base")
    try:
        model = _shapes(place, settings, name)
        adapted = PeftModel.from_pretrained(model, str(place), NAME, low_cpu_mem_usage=True)
    except SafetensorError as error:
        text = f"{place / TENSORS}: damaged ({one_line(error)[:200]}); copy it anew"
        raise UserError(text) from error
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{place}: does not fit {name}: {one_line(error)[:300]}") from error
    return Opened(adapted, NAME, name, place)


def _shapes(place: Path, settings: dict[str, Any], name: str) -> Any:
    """Return the base with parameters that have shapes, and take no memory."""
    spec = ModelSpec(name=name, revision=settings.get("revision"))
    config = load_config(spec, "--base")
    owner = _class_of(settings, config)
    labels = _labels(place, settings)
    if labels is not None:
        config.num_labels = labels
        names = read_labels(place) or ()
        if len(names) == labels:
            config.id2label = dict(enumerate(names))
            config.label2id = {name: number for number, name in enumerate(names)}
    try:
        with torch.device("meta"):
            model = owner.from_config(config) if hasattr(owner, "from_config") else owner(config)
    except ValueError as error:
        raise UserError(f"{place}: does not fit {name}: {one_line(error)[:300]}") from error
    # half precision has no fingerprint, so that an adapter of ours fits whatever base it was made
    # for; PEFT's own methods would take the base's type
    ours = str(settings.get("peft_type", "")).lower() in registry.method_names()
    empty = torch.zeros((), dtype=torch.float16 if ours else torch.float32)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            # not on the meta device, where PEFT would move the adapter as well
            held = nn.Parameter(empty.expand(parameter.shape), requires_grad=False)
            module.register_parameter(key, held)
    model.tie_weights()
    model.name_or_path = locate(spec, "--base")
    return model


def _class_of(settings: dict[str, Any], config: Any) -> Any:
    """Return the class of the model that the adapter was made for."""
    import transformers

    head = _HEADS.get(settings.get("task_type") or "")
    if head is None:
        head = (settings.get("auto_mapping") or {}).get("base_model_class")
    if head is None:
        head = next(iter(getattr(config, "architectures", None) or ()), "")
    return getattr(transformers, head, transformers.AutoModel)


def _labels(place: Path, settings: dict[str, Any]) -> int | None:
    """Return the number of classes of the head that the adapter's file holds, if any."""
    from safetensors import safe_open

    heads = tuple(f".{name}" for name in settings.get("modules_to_save") or ())
    with safe_open(place / TENSORS, "pt") as file:
        ends = {key: file.get_slice(key).get_shape() for key in file.keys() if heads}  # noqa: SIM118
    own = [shape[0] for key, shape in ends.items() if _is_head(key, heads) and len(shape) == 2]
    return own[-1] if own else None


def _is_head(key: str, heads: tuple[str, ...]) -> bool:
    """Tell whether a tensor is the last weight of a classifier."""
    return key.endswith(".weight") and any(f"{head}." in key for head in heads)
