"""Methods and peers that are measured side by side, most at the trained weights of LoRA r=16."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from case import Case
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.resident import enter_resident, sync_resident
from sft.optim.adamw import SparseAdamW
from sft.optim.prox import attach
from sft.quiet import quiet_libraries

RANK = 16
TARGETS = "all-linear"


def floor(base: nn.Module) -> Case:
    """Forward and input gradients alone: what no method that trains every layer can undercut."""
    base.requires_grad_(False)
    base.enable_input_require_grads()
    return Case(base, None)


def full(base: nn.Module) -> Case:
    """Full fine-tuning."""
    return Case(base, torch.optim.AdamW(base.parameters(), lr=1e-5, fused=True))


def lora(base: nn.Module) -> Case:
    """Stock PEFT LoRA, r=16 on every linear layer but the head."""
    return _peer(base, LoraConfig(r=RANK, target_modules=TARGETS))


def dora(base: nn.Module) -> Case:
    """Stock PEFT DoRA, r=16: LoRA and a trained norm of each row."""
    return _peer(base, LoraConfig(r=RANK, target_modules=TARGETS, use_dora=True))


def shira(base: nn.Module) -> Case:
    """Stock PEFT SHiRA: as many weights as LoRA in each matrix, at random positions."""
    return _peer(base, ShiraConfig(r=RANK, random_seed=0, target_modules=_linear_names(base)))


def supertuning(base: nn.Module) -> Case:
    """Stock PEFT Super-Tuning: the largest weights of each matrix."""
    share = lora_weights(base) / sum(m.weight.numel() for m in _linear(base).values())
    return _peer(base, SupertuningConfig(sparsity=1 - share, target_modules=_linear_names(base)))


def _peer(base: nn.Module, config: Any) -> Case:
    model = get_peft_model(base, config)
    return Case(model, _adamw(model))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def _linear(base: nn.Module) -> dict[str, nn.Linear]:
    head = base.get_output_embeddings()  # type: ignore[operator]
    linear = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in linear.items() if module is not head}


def _linear_names(base: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in _linear(base)})


def lora_weights(base: nn.Module, rank: int = RANK) -> int:
    """Count the weights that LoRA trains on every linear layer but the head."""
    return rank * sum(m.in_features + m.out_features for m in _linear(base).values())


def adapted(base: nn.Module, config: Any) -> Case:
    """A method of ours with resident weights and fused AdamW."""
    model = get_peft_model(base, config)
    enter_resident(model)
    return Case(model, _adamw(model), write=lambda: sync_resident(model))


def s2ft(base: nn.Module) -> Case:
    """S2FT: as many weights as LoRA, in whole input channels of the o and down projections."""
    return adapted(base, sft.S2FTConfig(num_weights=lora_weights(base), selection="random"))


def s2ft_sparse(base: nn.Module) -> Case:
    """S2FT: 1 % of the o and down projections."""
    return adapted(base, sft.S2FTConfig(density=0.01, selection="random"))


def sora(base: nn.Module) -> Case:
    """SoRA, 16 ranks, its proximal step included."""
    return _with_proximal_step(adapted(base, sft.SoRAConfig(r=RANK, strength=1e-3)))


def sora_half(base: nn.Module) -> Case:
    """SoRA after half of the 16 ranks have died and left."""
    case = adapted(base, sft.SoRAConfig(r=RANK, strength=1e-3))
    for layer in sparse_layers(case.model).values():
        layer.keep_ranks("default", torch.arange(RANK // 2))  # type: ignore[operator]
    case.optimizer = _adamw(case.model)
    return _with_proximal_step(case)


def _with_proximal_step(case: Case) -> Case:
    attach(case.optimizer, case.model.base_model.penalties("default"))  # type: ignore[union-attr]
    return case


def sltrain(base: nn.Module) -> Case:
    """SLTrain beside the frozen weights: half of LoRA's weights in 8 ranks, half in S, resident."""
    half = RANK // 2
    share = lora_weights(base, half) / sum(m.weight.numel() for m in _linear(base).values())
    return adapted(base, sft.SLTrainConfig(r=half, density=share))


def sltrain_scratch(base: nn.Module) -> Case:
    """SLTrain from scratch: the same shapes as c B A + S, r=128, density 3 %, the rest dense."""
    model = sft.pretrain_model(base.config, sft.SLTrainConfig(r=128, alpha=32, density=0.03))
    return Case(model, _adamw(model))


def spiel(base: nn.Module) -> Case:
    """SpIEL between windows: as many weights as LoRA in all, anywhere in the linear layers."""
    return _deltas(base, match_lora_rank=RANK)


def spiel_sparse(base: nn.Module) -> Case:
    """SpIEL between windows: 0.5 % of the linear layers."""
    return _deltas(base, density=0.005)


def spiel_int8(base: nn.Module) -> Case:
    """SpIEL between windows, 0.5 %, the inputs of its gradient kept in int8."""
    return _deltas(base, density=0.005, saved_inputs="int8")


def _deltas(base: nn.Module, **settings: Any) -> Case:
    case = adapted(base, sft.SpielConfig(target_modules=TARGETS, **settings))
    trained = [p for p in case.model.parameters() if p.requires_grad]
    case.optimizer = SparseAdamW(trained, lr=1e-4)
    return case


def spiel_aside(base: nn.Module) -> Case:
    """SpIEL, 0.5 %, the base untouched: y = base(x) + x Delta^T."""
    case = spiel_sparse(base)
    for layer in sparse_layers(case.model).values():
        layer.leave_resident()
    return case


def spiel_window(base: nn.Module) -> Case:
    """SpIEL, 0.5 %, inside a window: the gradient at as many candidates is read too."""
    return _moving(base, reselect_every=1000, window=1000)


def spiel_reselect(base: nn.Module) -> Case:
    """SpIEL, 0.5 %, a window of one update: every gradient entry is ranked, deltas move."""
    return _moving(base, reselect_every=1, window=1)


def _moving(base: nn.Module, **settings: Any) -> Case:
    case = _deltas(base, density=0.005, first_full=False, **settings)
    case.dynamics = case.model.base_model.dynamics("default", 10_000)  # type: ignore[union-attr]
    return case


PEERS = (floor, full, lora, dora, shira, supertuning)
OURS = (spiel, s2ft, sora, sltrain, spiel_sparse, spiel_int8, s2ft_sparse)
# seen in one cell alone
MORE = (spiel_window, spiel_reselect, spiel_aside, sora_half, sltrain_scratch)
CASES = {build.__name__: build for build in (*PEERS, *OURS, *MORE)}


def quiet() -> None:
    """Silence bars, and what libraries warn programmers of."""
    quiet_libraries()
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
