"""What a zeroth-order run leaves behind: its log, and its start."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.adapters.layer import sparse_layers
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.run.folder import ZEROTH_ORDER
from sft.whole import written_whole
from sft.zeroth_order.training import stepping

LOG, START = "log.safetensors", "start"
SAMPLE = 256  # entries of a frozen weight
_STRIDE = 2_654_435_761  # a prime larger than any weight, so that no entry is taken twice

logger = logging.getLogger(__name__)


class ZerothOrderLogCallback(TrainerCallback):  # type: ignore[misc]
    """Writes `output_dir/zeroth_order`, from which `sft replay` rebuilds the trained weights.

    `log.safetensors` is written with every log line of the Trainer and at the end; `start/` holds
    the adapter as it was before the first update, where there is one.
    """

    resumed_from: Path | None = None  # set by a trainer that resumes
    base: tuple[str, str | None] | None = None  # name and revision; default: the model's own name

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
        folder, stock = _folder(args), stepping(optimizer)
        folder.mkdir(parents=True, exist_ok=True)
        adapted = hasattr(model, "peft_config")
        first = stock.trained[0].parameter
        if state.global_step == 0 and stock.updates > 0:
            _check_continued(stock, args)
        elif state.global_step == 0:
            own = getattr(getattr(model, "config", None), "_name_or_path", "")
            name, revision = self.base or (str(own), None)
            stock.log.header |= {
                "start_sha": weights_sha((t.name, t.parameter) for t in stock.trained),
                "frozen_sha": frozen_sha(model, {t.name for t in stock.trained}),
                "device": first.device.type,
                "model": name,
                "revision": revision,
                "model_dtype": str(getattr(model, "dtype", first.dtype)).removeprefix("torch."),
                "adapter": adapted,
            }
            if adapted:
                with written_whole(folder / START) as temporary:
                    model.save_pretrained(temporary)  # type: ignore[operator]
        elif adapted and not (folder / START).is_dir():
            _bring_start(folder, self.resumed_from)
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
            stepping(optimizer).log.save(_folder(args) / LOG)

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
        stock = stepping(optimizer)
        # the best checkpoint, loaded at the end, is not what the last update led to
        if not args.load_best_model_at_end:
            stock.log.header["end_sha"] = weights_sha((t.name, t.parameter) for t in stock.trained)
        stock.log.save(_folder(args) / LOG)


def _check_continued(optimizer: ZerothOrderOptimizer, args: TrainingArguments) -> None:
    """Warn when a second training starts elsewhere than where the log of the first one leads."""
    end = optimizer.log.header.get("end_sha")
    found = weights_sha((t.name, t.parameter) for t in optimizer.trained)
    if args.load_best_model_at_end or end not in (None, found):
        logger.warning(
            "train: the log goes on, but the weights were changed since, so it will not lead to "
            "those of the end; set trainer.optimizer = None to begin a log of its own"
        )


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


def frozen_sha(model: nn.Module, trained: Collection[str]) -> str:
    """Return the SHA-256 over a sample of each weight that is not trained.

    Left out are quantised weights, which may differ from device to device, and the base weights of
    sparse layers, whose adapters know them by fingerprints of their own: in training they may hold
    other values.

    Args:
        model: as a run starts.
        trained: full names of the trained parameters.
    """
    own = {id(p) for layer in sparse_layers(model).values() for p in layer.parameters()}
    return weights_sha(
        (f"{name} {list(p.shape)}", _sample(p))
        for name, p in sorted(model.named_parameters())
        if name not in trained and id(p) not in own and p.is_floating_point()
    )


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    count = min(SAMPLE, flat.numel())
    return flat[torch.arange(count, device=flat.device) * _STRIDE % max(1, flat.numel())]


def _bring_start(folder: Path, checkpoint: Path | None) -> None:
    """Copy the start of the run that a checkpoint of another folder belongs to."""
    found = (checkpoint or folder).parent / ZEROTH_ORDER / START
    if found.is_dir():
        shutil.copytree(found, folder / START)
        return
    logger.warning(
        "resume_from_checkpoint: the adapter that the run started from is not in %s; keep it "
        "there, or sft replay will lack it", folder,
    )  # fmt: skip


def _folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir) / ZEROTH_ORDER
