"""Two processes that compute one loss in chunks, under DDP and FSDP2, by hand and in a trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from sft.chunked_loss import causal_model, chunked_nll


def build():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def batch(rank):
    drawn = torch.Generator().manual_seed(rank)
    ids = torch.randint(1, 48, (2, 9), generator=drawn)
    labels = ids.clone()
    if rank == 1:  # fewer chunks than the other has
        labels[:, :7] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def sharded(model, *, head):
    for layer in model.model.layers:
        fully_shard(layer)
    if head:  # else it is of the root, which is whole from forward to backward
        fully_shard(model.lm_head)
    return fully_shard(model)


def wrapped(kind):
    model = build()
    if kind == "ddp":
        return DistributedDataParallel(model)
    return sharded(model, head=kind == "fsdp-head")


def worst(kind, expected):
    """Return the largest difference of a gradient from one process's on both batches."""
    model = wrapped(kind)
    loss, _ = chunked_nll(model, batch(dist.get_rank()), rows=5)
    loss.backward()
    found = 0.0
    for name, parameter in causal_model(model).named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found = max(found, float((grad - expected[name]).abs().max()))
    return found


def trained(out: Path, *, chunked: bool) -> dict[str, Any]:
    """Train on rows of unequal labels by plain gradients, whose size shows in the weights."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from sft import SparseTrainer

    rows = [batch(rank) for rank in (0, 1, 1, 0)]
    columns = {key: torch.cat([row[key] for row in rows]).tolist() for key in rows[0]}
    arguments = TrainingArguments(
        str(out.parent / "trained"), use_cpu=True, max_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, learning_rate=0.5, optim="sgd", max_grad_norm=0.0,
        report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no", seed=3,
    )  # fmt: skip
    trainer = SparseTrainer(
        model=build(), args=arguments, train_dataset=Dataset.from_dict(columns),
        chunked_loss=chunked,
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"losses": losses, "weights": list(trainer.model.state_dict().values())}


def in_a_trainer(out: Path) -> dict[str, Any]:
    """Return how far training in chunks ends from training on whole logits, and how far it went."""
    whole, chunked = (trained(out, chunked=chunked) for chunked in (False, True))
    ends, start = zip(whole["weights"], chunked["weights"], strict=True), build().state_dict()
    moved = zip(whole["weights"], start.values(), strict=True)
    return {
        "losses": [whole["losses"], chunked["losses"]],
        "apart": max(float((a - b).abs().max()) for a, b in ends),
        "moved": max(float((a - b).abs().max()) for a, b in moved),
        "processes": dist.get_world_size(),
    }


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    alone = build()
    (sum(alone(**batch(rank)).loss for rank in (0, 1)) / 2).backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    kinds = ("ddp", "fsdp-root", "fsdp-head")
    found: dict[str, Any] = {kind: worst(kind, expected) for kind in kinds}
    found["trainer"] = in_a_trainer(out)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()  # nobody leaves while another still speaks
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
