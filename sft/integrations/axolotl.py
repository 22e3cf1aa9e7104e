"""axolotl trains our methods: `plugins: [sft.integrations.axolotl.SparsePlugin]`.

    adapter: spiel
    sparse:
      density: 0.005

The keys under `sparse:` are those of a recipe's `method:`, less its name. Only axolotl's public
plug-in interface is used. Without axolotl the module can be imported, and its plug-in is no use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from sft.errors import UserError, unknown_name
from sft.recipe.fields import check_fields, key_error
from sft.recipe.source import Source

try:
    from axolotl.integrations.base import AdapterCapabilities, BasePlugin
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "axolotl":
        raise  # an axolotl that lacks a library of its own says so itself
    AdapterCapabilities, BasePlugin = None, object

SETTINGS = "sft.integrations.axolotl.SparseArgs"
TRAINERS = "sft.integrations.axolotl_trainers"
PREFERENCES = ("dpo", "ipo")


class SparseArgs(BaseModel):
    """What the plug-in adds to axolotl's configuration."""

    sparse: dict[str, Any] | None = None


class SparsePlugin(BasePlugin):  # type: ignore[misc]  # axolotl's class, or `object` without it
    """Puts a sparse adapter on the model, and trains it by axolotl's trainers with our mix-in."""

    def register(self, cfg: Any) -> None:
        """Check the block before a model is loaded, and name the trainer of preferences.

        Raises:
            UserError: the settings do not fit the method, or axolotl's other keys.
        """
        if not _is_ours(cfg):
            return
        _check_kind(cfg)
        build_config(cfg)
        if cfg.get("rl") and not cfg.get("trainer_cls"):
            cfg["trainer_cls"] = f"{TRAINERS}.SparseAxolotlDPOTrainer"

    def get_input_args(self) -> str:
        """Return where the model of the `sparse:` block is."""
        return SETTINGS

    def get_adapter_capabilities(self) -> list[Any]:
        """Return the names that `adapter:` may have besides axolotl's."""
        return [AdapterCapabilities(name=name) for name in _methods()]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Return the model with its adapter and the adapter's configuration; None if not ours."""
        if not _is_ours(cfg):
            return None
        from peft import PeftModel, get_peft_model

        config = build_config(cfg)
        if config_only:
            return None, config
        if not (folder := cfg.get("lora_model_dir")):
            return get_peft_model(model, config), config
        loaded = PeftModel.from_pretrained(model, folder, is_trainable=not inference)
        return loaded, loaded.peft_config["default"]

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Return axolotl's trainer with our mix-in; preferences have theirs by `trainer_cls`."""
        if not _is_ours(cfg) or cfg.get("rl") or cfg.get("trainer_cls"):
            return None
        from sft.integrations.axolotl_trainers import SparseAxolotlTrainer

        return SparseAxolotlTrainer


def build_config(cfg: Any) -> Any:
    """Return the PEFT configuration that `adapter:` and `sparse:` ask for.

    Args:
        cfg: axolotl's configuration, checked by it or not.

    Raises:
        UserError: a key that the method lacks, or a value that does not fit.
    """
    from sft.run.trained_adapter import SparseAdapter

    name, given = cfg["adapter"], cfg.get("sparse") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"sparse: got {given!r}, allowed are keys of the method {name}")
    fields = _plain(given)
    source, owner = Source("axolotl", {"sparse": fields}), SparseAdapter.config_class(name)
    check_fields(source, "sparse", owner, fields, SparseAdapter.hidden(name))
    try:
        method = SparseAdapter(name, fields, "CAUSAL_LM")
    except (ValueError, TypeError) as error:
        raise key_error(source, "sparse", fields, error) from error
    if method.from_scratch:
        raise UserError(
            "sparse.form: got 'pretrain', which builds its model from random weights and axolotl "
            "loads one; use `sft train` with task: pretrain"
        )
    return method.config


def _check_kind(cfg: Any) -> None:
    """Refuse what axolotl trains by trainers that take no mix-in from a plug-in."""
    if (kind := cfg.get("rl")) and kind not in PREFERENCES:
        raise UserError(
            f"rl: got {str(kind)!r} with adapter: {cfg['adapter']}, allowed are "
            f"{', '.join(PREFERENCES)}; for others use the trainers of sft.trainers"
        )
    for key in ("reward_model", "process_reward_model"):
        if cfg.get(key):
            raise UserError(
                f"{key}: got true with adapter: {cfg['adapter']}, allowed is false; "
                "use `sft train` with task: reward"
            )


def _is_ours(cfg: Any) -> bool:
    """Whether the adapter is one of our methods."""
    name, methods = cfg.get("adapter"), _methods()
    if cfg.get("sparse") and name not in methods:
        raise UserError(
            f"adapter: got {name!r} beside a `sparse:` block: "
            f"{unknown_name(str(name), methods, kind='method')}"
        )
    return name in methods


def _methods() -> list[str]:
    from sft.run.trained_adapter import SparseAdapter

    return SparseAdapter.names()


def _plain(value: Any) -> Any:
    """Return axolotl's kind of dict, and what it holds, as Python's own."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
