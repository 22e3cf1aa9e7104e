"""The model card of an export: what it is, how it was trained, what that did, how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sft.run.folder import RECIPE, RECORD

CARD = "README.md"
# Where the models that lie in packages come from.
_PUBLISHED = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
    "weight_decay", "max_grad_norm", "max_length", "bf16", "fp16", "beta", "num_generations",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Args:
        form: of the export: "merged", "adapter", "lora", "shira", "patch" or "gguf".
        base: name of the base, as it was loaded.
        architecture: class of the stock model, or "".
        recipe: of the run, resolved; {} where the run is not known.
        record: the run's run.json; {} where the run is not known.
        adapter: adapter_config.json, where the run is not known.
    """

    form: str
    base: str
    architecture: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)


def read_run(run: Path | None) -> dict[str, Any]:
    """Return the recipe and the record of a run's folder, as far as they can be read."""
    if run is None:
        return {}
    found: dict[str, Any] = {}
    try:
        found["recipe"] = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8")) or {}
        found["record"] = json.loads((run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        pass  # a run that has not ended has no record yet
    return found


def write_card(folder: Path, facts: Facts, title: str | None = None) -> None:
    """Write README.md into an exported folder.

    Args:
        folder: of the export.
        facts: what it tells.
        title: of the card, default: the folder's name.
    """
    from huggingface_hub import ModelCard

    body = _body(title or folder.name, facts)
    text = f"---\n{_metadata(facts)}\n---\n\n" + "\n".join(body)
    ModelCard(text, ignore_metadata_errors=True).save(folder / CARD)


def licence_of(base: str) -> str | None:
    """Return the licence that a base's own card gives, if the card is at hand."""
    from huggingface_hub import ModelCard

    if base in _PUBLISHED:
        return _PUBLISHED[base][1]
    path = Path(base).expanduser() / CARD
    try:
        card = ModelCard.load(path if path.is_file() else base) if _named(base, path) else None
    except Exception:  # of any kind: no network, no such repository, no metadata
        return None
    return None if card is None else card.data.get("license")


def _named(base: str, path: Path) -> bool:
    return path.is_file() or (base.count("/") == 1 and not Path(base).expanduser().exists())


def _metadata(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    known = _PUBLISHED.get(facts.base, (facts.base, None))[0]
    published = known.count("/") == 1 and not Path(known).expanduser().exists()
    method = _method(facts).get("name")
    data = ModelCardData(
        base_model=known if published else None,
        library_name="peft" if facts.form in ("adapter", "lora", "shira") else "transformers",
        license=licence_of(facts.base),
        tags=[tag for tag in ("sparse-sft", method, facts.form) if tag],
        pipeline_tag="text-generation" if "CausalLM" in facts.architecture else None,
    )
    return str(data.to_yaml())


def _body(title: str, facts: Facts) -> Iterator[str]:
    method = _method(facts)
    base = _shown(facts.base)
    yield f"# {title}\n"
    yield f"`{base}`, fine-tuned with {method.get('name', 'sparse-sft')}; {_WHAT[facts.form]}\n"
    yield "## How to load it\n"
    yield f"```python\n{_snippet(title, base, facts)}\n```\n"
    if method:
        yield "## How it was trained\n"
        yield from _training(facts, method)
    yield from _results(facts.record)
    yield "## Licence\n"
    licence = licence_of(facts.base)
    yield (
        f"That of the base model: {licence}.\n"
        if licence
        else f"The licence of the base model, `{base}`, applies; see there.\n"
    )


_WHAT = {
    "merged": "a whole model, the adapter merged into its weights.",
    "adapter": "the adapter alone.",
    "lora": "a LoRA of stock PEFT.",
    "shira": "a SHiRA of stock PEFT.",
    "patch": "the weights that changed, by name and position.",
    "gguf": "a GGUF file for llama.cpp.",
}


def _method(facts: Facts) -> dict[str, Any]:
    if facts.recipe:
        return dict(facts.recipe.get("method", {}))
    kind = facts.adapter.get("peft_type")
    return {"name": str(kind).lower()} if kind else {}


def _shown(name: str) -> str:
    """Return a name without the path that only its author has."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def _snippet(title: str, base: str, facts: Facts) -> str:
    """Return Python that loads what was exported."""
    kind = facts.architecture or "AutoModelForCausalLM"
    stock = [f"from transformers import {kind}"]
    if facts.form == "merged":
        return "\n".join([*stock, "", f'model = {kind}.from_pretrained("{title}")'])
    if facts.form == "gguf":
        call = f'{kind}.from_pretrained("{title}", gguf_file="model.gguf")'
        return "\n".join([*stock, "", f"model = {call}"])
    embedded = facts.base in _PUBLISHED  # not the published weights: rounded to 4 bits
    where = f'folder_of("{base}")' if embedded else f'"{base}"'
    ours = ["from sft.embedded import folder_of"] if embedded else []
    load = f"{kind}.from_pretrained({where})"
    if facts.form == "patch":
        lines = ["from pathlib import Path", "", *stock, "", *ours]
        call = f'apply_patches(dict(model.named_parameters()), Path("{title}"))'
        tail = ["from sft.export.patch import apply_patches", "", f"model = {load}", call]
        return "\n".join([*lines, *tail])
    head = ["import sft  # teaches PEFT the method"] if facts.form == "adapter" else []
    call = f'model = PeftModel.from_pretrained(base, "{title}")'
    lines = [*head, "from peft import PeftModel", *ours, *stock, "", f"base = {load}", call]
    return "\n".join(lines)


def _training(facts: Facts, method: dict[str, Any]) -> Iterator[str]:
    record, recipe = facts.record, facts.recipe
    if "trained_weights" in record:
        share = 100 * record["trained_weights"] / max(1, record["all_weights"])
        yield (
            f"{record['trained_weights']:,} of {record['all_weights']:,} weights were trained "
            f"({share:.3g} %), {record['steps']} steps.\n"
        )
    yield from _data(facts)
    rows = {f"method.{key}": value for key, value in method.items() if value is not None}
    training = recipe.get("training", {})
    rows |= {f"training.{key}": training[key] for key in _SETTINGS if training.get(key) is not None}
    if "seed" in recipe:
        rows["seed"] = recipe["seed"]
    yield "| setting | value |\n|---|---|"
    for key, value in rows.items():
        yield f"| {key} | {_cell(value)} |"
    versions = record.get("versions")
    if isinstance(versions, dict):
        yield "\nVersions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."
    yield ""


def _data(facts: Facts) -> Iterator[str]:
    data, record = facts.recipe.get("data", {}), facts.record.get("data", {})
    sources = data.get("train")
    if not sources:
        return
    listed = sources if isinstance(sources, list) else [sources]
    names = [_shown(str(s.get("path", s) if isinstance(s, dict) else s)) for s in listed]
    counts = ""
    if isinstance(record, dict) and "train" in record:
        counts = f": {record['train']} examples to train on, {record.get('held_out', 0)} held out"
    yield f"Data: {', '.join(f'`{name}`' for name in names)}{counts}.\n"


def _results(record: dict[str, Any]) -> Iterator[str]:
    before, after = record.get("before") or {}, record.get("after") or {}
    if after:
        yield "## What it learnt\n"
        yield "On held-out examples:\n"
        yield "| metric | before | after |\n|---|---|---|"
        for key, value in after.items():
            yield f"| {key} | {_cell(before.get(key, ''))} | {_cell(value)} |"
        yield ""
    forgetting = record.get("forgetting") or {}
    plain = {key: v for key, v in forgetting.items() if isinstance(v, int | float | bool)}
    if plain:
        yield "## What it forgot\n"
        yield "On general text:\n"
        yield "| | |\n|---|---|"
        for key, value in plain.items():
            yield f"| {key} | {_cell(value)} |"
        yield ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    shown = _shown(value) if isinstance(value, str) else value
    return str(shown).replace("|", "\\|").replace("\n", " ")
