"""Two processes that compute one loss in chunks, under DDP and FSDP2; writes what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    alone = build()
    (sum(alone(**batch(rank)).loss for rank in (0, 1)) / 2).backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    found = {kind: worst(kind, expected) for kind in ("ddp", "fsdp-root", "fsdp-head")}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()  # nobody leaves while another still speaks
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
