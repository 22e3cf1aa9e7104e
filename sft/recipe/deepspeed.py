"""`training.deepspeed`: a DeepSpeed configuration, inline or in a file, over our defaults."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from sft.errors import UserError, unknown_name
from sft.recipe.source import Source

KEY = "training.deepspeed"
STAGES = (0, 1, 2, 3)
STALE = 900.0  # seconds; no build takes as long

# filled in from the other fields of the section where nothing is given
_AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def resolve_deepspeed(given: Any, source: Source) -> dict[str, Any]:
    """Check a configuration and lay it over our defaults.

    The method's own optimizer is allowed, and stays in its place where state is offloaded; an
    "optimizer" of Adam's family is torch's, which needs no compiler.

    Args:
        given: the configuration, or the path of a JSON or YAML file.
        source: names file and line in errors.

    Raises:
        RecipeError: the file or the stage is missing, or a key of zero_optimization is unknown.
    """
    config = dict(_read(given, source) if isinstance(given, str) else given)
    zero: Any = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in STAGES or isinstance(stage, bool):
        found = "is missing" if stage is None else f"got {stage!r}"
        raise source.error(KEY, f"zero_optimization.stage {found}, allowed are 0, 1, 2 and 3")
    _check_names(zero, source)
    resolved: dict[str, Any] = dict.fromkeys(_AUTO, "auto")
    resolved |= {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    resolved |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    resolved |= config
    if str(config.get("optimizer", {}).get("type", "")).lower() in ("adam", "adamw"):
        optimizer = config["optimizer"]
        options = {"torch_adam": True, **optimizer.get("params", {})}
        resolved["optimizer"] = {**optimizer, "params": options}
    return resolved


def prepare_processes() -> None:
    """Say who is alone in a run, where no launcher has: DeepSpeed would ask for mpi4py.

    Raises:
        UserError: an interrupted build of DeepSpeed's left a lock that would be waited for.
    """
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(_free_port())})
    _check_locks()


def _read(path: str, source: Source) -> dict[str, Any]:
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        raise source.error(KEY, f"got {path!r}, which is no file; name a JSON or YAML file")
    text = file.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise source.error(KEY, f"{path} does not read: {error}") from error
    if not isinstance(found, dict):
        raise source.error(KEY, f"{path} holds {type(found).__name__}, allowed is a mapping")
    return found


def _check_names(zero: dict[str, Any], source: Source) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise source.error(KEY, "needs the package deepspeed; pip install 'sparse-sft[deepspeed]'")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(f.alias for f in fields.values() if f.alias)}
    for key in zero:
        if key not in known:
            raise source.error(KEY, f"zero_optimization.{key}: {unknown_name(str(key), known)}")


def _check_locks() -> None:
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.glob("**/deepspeed_*/lock")) + sorted(root.glob("**/cpu_adam/lock")):
        if time.time() - lock.stat().st_mtime > STALE:
            raise UserError(
                f"{KEY}: an interrupted build left {lock}, which DeepSpeed would wait for without "
                "end; remove it"
            )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
