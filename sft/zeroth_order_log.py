"""What a zeroth-order run leaves behind: its log, its start, checkpoints known to be whole."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.checkpoint import save_state
from sft.folder import ZEROTH_ORDER
from sft.identity import sparse_tuner
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.whole import written_whole

LOG, START = "log.safetensors", "start"
PACKAGES = ("sparse-sft", "torch", "transformers", "accelerate")

logger = logging.getLogger(__name__)


class ZerothOrderLogCallback(TrainerCallback):  # type: ignore[misc]
    """Writes `output_dir/zeroth_order`, from which `sft replay` rebuilds the trained weights.

    `log.safetensors` is written with every log line of the Trainer and at the end; `start/` holds
    the adapter as it was before the first update, where there is one. Checkpoints of models
    without a sparse adapter get the mark of a whole one; the others have it from SparseCallback.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Note what the run starts from."""
        if not state.is_world_process_zero:
            return
        folder, stock = _folder(args), _unwrap(optimizer)
        folder.mkdir(parents=True, exist_ok=True)
        adapted = hasattr(model, "peft_config")
        if state.global_step == 0:
            stock.log.header |= {
                "start_sha": weights_sha((t.name, t.parameter) for t in stock.trained),
                "device": stock.trained[0].parameter.device.type,
                "model": str(getattr(model.config, "_name_or_path", "")),
                "model_dtype": str(model.dtype).removeprefix("torch."),
                "adapter": adapted,
            }
            if adapted:
                with written_whole(folder / START) as temporary:
                    model.save_pretrained(temporary)  # type: ignore[operator]
        elif adapted and not (folder / START).is_dir():
            _bring_start(folder, args.resume_from_checkpoint)
        stock.log.header["end_sha"] = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Write the log of the updates so far."""
        if state.is_world_process_zero and optimizer is not None:
            _unwrap(optimizer).log.save(_folder(args) / LOG)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Mark the checkpoint as a whole one."""
        if sparse_tuner(model) is not None or not args.should_save:
            return
        notes = {
            "step": state.global_step,
            "versions": {name: version(name) for name in PACKAGES},
            "resumable": not args.save_only_model,
        }
        save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", {}, notes)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Write the whole log, with the hash of where it leads."""
        if not state.is_world_process_zero:
            return
        stock = _unwrap(optimizer)
        # the best checkpoint, loaded at the end, is not what the last update led to
        if not args.load_best_model_at_end:
            stock.log.header["end_sha"] = weights_sha((t.name, t.parameter) for t in stock.trained)
        stock.log.save(_folder(args) / LOG)


def weights_sha(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over names, types, shapes and bits of some tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in named:
        value = tensor.detach()
        shape = "x".join(map(str, value.shape))
        digest.update(f"{name} {value.dtype} {shape}\n".encode())
        held = value.contiguous().flatten().view(torch.uint8)
        for start in range(0, len(held), 2**24):  # a copy of a large tensor is never made
            digest.update(held[start : start + 2**24].cpu().numpy().tobytes())
    return digest.hexdigest()


def _bring_start(folder: Path, checkpoint: str | None) -> None:
    """Copy the start of the run that a checkpoint of another folder belongs to."""
    found = Path(checkpoint).parent / ZEROTH_ORDER / START if checkpoint else None
    if found is not None and found.is_dir():
        shutil.copytree(found, folder / START)
        return
    logger.warning(
        "resume_from_checkpoint: the adapter that the run started from is not in %s; keep it "
        "there, or sft replay will lack it", folder,
    )  # fmt: skip


def _folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir) / ZEROTH_ORDER


def _unwrap(optimizer: Any) -> ZerothOrderOptimizer:
    while not isinstance(optimizer, ZerothOrderOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
