"""What runs with what: every cell names the tests that show it, or the reason why it does not run.

`python tests/engines/support_table.py` writes the tables of docs/engines.md anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "engines.md"

TRAINING = "tests/sft/training/"
ENGINES = "tests/engines/"
ONE = TRAINING + "test_every_method.py::test_interrupted_and_resumed_is_uninterrupted[{}-1]"
CUT = TRAINING + "test_resume.py::test_every_cut_resumes_to_the_same_bits[{}]"
DDP = ENGINES + "test_ddp.py::test_two_processes_end_where_one_ends_on_the_whole_batch[{}]"
ZERO = ENGINES + "test_deepspeed.py::test_two_processes_end_where_one_does[{}]"
ZERO_MORE = ENGINES + "test_deepspeed.py::test_further_runs_end_where_one_process_does[{}]"
ZERO_NOT = ENGINES + "test_deepspeed.py::test_what_cannot_run_is_refused_with_what_can[{}]"
FSDP = ENGINES + "test_fsdp.py::test_two_processes_end_where_one_does[{}]"
FSDP_NOT = ENGINES + "test_fsdp_settings.py::test_settings_of_a_method[{}]"
PACKED = ENGINES + "quantized/test_training.py::test_a_packed_base_trains_as_its_dense_twin[{}]"
CHOSEN = ENGINES + "quantized/test_training.py::test_batches_choose_as_over_the_dense_twin[{}]"
QUANTIZED = ENGINES + "quantized/test_training.py::{}"
EIGHT = ENGINES + "quantized/test_training.py::test_batches_choose_over_8_bits_up_to_near_ties[{}]"
FORWARD = "test_forward_passes_alone_train_an_adapter_over_a_packed_base[{}]"
COPIED = ENGINES + "test_fsdp.py::test_copies_over_a_packed_base_end_where_one_process_does[{}]"
REFUSED = ENGINES + "test_ddp.py::test_what_cannot_be_is_refused_by_every_process"
S2FT = TRAINING + "test_s2ft.py::{}"
SLTRAIN = TRAINING + "test_sltrain.py::{}"
EVERY = TRAINING + "test_every_method.py::{}"
ZEROTH = TRAINING + "test_zeroth_order{}"
ONCE = ENGINES + "test_checkpointing.py::test_layers_below_the_trained_ones_run_once[{}]"
DISK = ENGINES + "test_offload.py::test_a_base_on_disk_trains_to_the_same_bits[{}]"
HOST = ENGINES + "test_offload.py::test_state_on_the_cpu_is_the_same_state[{}-adamw_torch_fused]"


@dataclass(frozen=True)
class Cell:
    """It runs if there is no reason `why` it does not; the tests show either."""

    tests: tuple[str, ...] = ()
    why: str = ""


Table = dict[str, tuple[Cell, ...]]  # by row, a cell for each column


def yes(pattern: str, *names: str) -> Cell:
    return Cell(tuple(pattern.format(name) for name in names))


def no(why: str, pattern: str = "", *names: str) -> Cell:
    return Cell(tuple(pattern.format(name) for name in names), why)


NO_ZEROTH = no(
    "it has no gradients to shard", ZEROTH, ".py::test_engines_that_shard_weights_are_refused"
)
NO_SM3 = no("ZeRO's flat vectors have no rows and columns for SM3", ZERO_NOT, "sm3")
NO_BACKWARD = no("ZeRO-3 takes no backward pass beside training's", ZERO_NOT, "calibrated")
BY_ENGINE_HEAD = ("one process", "DDP", "ZeRO-0", "ZeRO-1, 2", "ZeRO-3", "FSDP2")
BY_ENGINE: Table = {
    "SpIEL, `growth: gradient`": (
        yes(ONE, "spiel"),
        yes(DDP, "spiel", "spiel-accumulated"),
        yes(ZERO, "spiel-0"),
        yes(ZERO, "spiel-1", "spiel-2", "spiel-accumulated-2"),
        yes(ZERO, "spiel-3"),
        yes(FSDP, "spiel", "spiel-accumulated", "spiel-few"),
    ),
    "SpIEL, `growth: momentum`": (
        yes(CUT, "momentum"),
        yes(DDP, "spiel-momentum"),
        yes(ZERO, "spiel-momentum-0"),
        *(NO_SM3,) * 2,
        yes(FSDP, "spiel-momentum"),
    ),
    "SpIEL, support chosen by batches": (
        yes(CUT, "calibrated"),
        yes(DDP, "spiel-calibrated"),
        yes(ZERO_MORE, "spiel-calibrated-0"),
        yes(ZERO, "spiel-calibrated-2"),
        NO_BACKWARD,
        yes(FSDP, "spiel-calibrated"),
    ),
    "S2FT": (
        yes(ONE, "s2ft"),
        yes(DDP, "s2ft"),
        yes(ZERO_MORE, "s2ft-0"),
        yes(ZERO, "s2ft-2"),
        yes(ZERO, "s2ft-3"),
        yes(FSDP, "s2ft"),
    ),
    "S2FT, units chosen by batches": (
        yes(S2FT, "test_calibration_chooses_before_the_first_update"),
        yes(DDP, "s2ft-activation", "s2ft-gradient"),
        yes(ZERO_MORE, "s2ft-activation-0", "s2ft-gradient-0"),
        yes(ZERO, "s2ft-gradient-2"),
        yes(ZERO, "s2ft-activation-3"),
        yes(FSDP, "s2ft-activation"),
    ),
    "S2FT, `layout: permuted`": (
        yes(S2FT, "test_s2ft_fact09_fact26_resumed_equals_uninterrupted"),
        yes(DDP, "s2ft-gradient"),
        yes(ZERO_MORE, "s2ft-gradient-0"),
        yes(ZERO, "s2ft-gradient-2"),
        no("no weight lies whole that could be reordered", ZERO_NOT, "permuted"),
        no("no weight lies whole that could be reordered", FSDP_NOT, "layout"),
    ),
    "S2FT, single experts": (
        yes(DDP, "s2ft-experts"),
        yes(DDP, "s2ft-experts"),
        yes(ZERO_MORE, "s2ft-experts-0"),
        yes(ZERO, "s2ft-experts-1"),
        no("ZeRO-3 gathers no weight that a layer reads by itself", ZERO_NOT, "experts"),
        yes(FSDP, "s2ft-experts"),
    ),
    "SoRA": (
        yes(ONE, "sora"),
        yes(DDP, "sora"),
        yes(ZERO_MORE, "sora-0"),
        yes(ZERO, "sora-2"),
        yes(ZERO, "sora-3"),
        yes(FSDP, "sora", "sora-l1"),
    ),
    "SoRA, `compact_after`": (
        yes(TRAINING + "test_sora.py::{}", "test_every_cut_resumes_to_the_same_bits"),
        no("gradient buckets are laid out for all ranks", REFUSED, ""),
        *(no("gradient buckets are laid out for all ranks", ZERO_NOT, "compaction"),) * 3,
        no("shards keep their size", FSDP_NOT, "compact_after"),
    ),
    "SLTrain": (
        yes(ONE, "sltrain"),
        yes(DDP, "sltrain"),
        yes(ZERO_MORE, "sltrain-0"),
        yes(ZERO, "sltrain-2"),
        yes(ZERO, "sltrain-3"),
        yes(FSDP, "sltrain"),
    ),
    "SLTrain, `form: pretrain`": (
        yes("tests/sft/test_pretrain.py::{}", "test_everything_trains"),
        yes(DDP, "sltrain-pretrain"),
        yes(ZERO_MORE, "sltrain-pretrain-0"),
        yes(ZERO_MORE, "sltrain-pretrain-1", "sltrain-pretrain-2"),
        no("ZeRO-3 partitions no parameter of no entries", ZERO_NOT, "pretrain"),
        yes(FSDP, "sltrain-pretrain"),
    ),
    "SLTrain, `trainable_scale`": (
        yes(SLTRAIN, "test_interrupted_and_resumed_is_uninterrupted"),
        yes(DDP, "sltrain-scale"),
        yes(ZERO_MORE, "sltrain-scale-0"),
        yes(ZERO_MORE, "sltrain-scale-1", "sltrain-scale-2"),
        yes(ZERO_MORE, "sltrain-scale-3"),
        yes(FSDP, "sltrain-scale"),
    ),
    "SLTrain, `per_layer_updates`": (
        yes(SLTRAIN, "test_fact24_per_layer_updates_are_the_ordinary_ones"),
        no("a step in backward sees the gradients of one process", REFUSED, ""),
        *(no("DeepSpeed steps by itself, after backward", ZERO_NOT, "per-layer"),) * 3,
        no("FSDP hands out gradients after backward", FSDP_NOT, "per_layer_updates"),
    ),
    "full": (
        yes("tests/sft/run/test_trainable.py::{}", "test_full_trains_the_model_itself"),
        yes(DDP, "full"),
        yes(ZERO_MORE, "full-0"),
        yes(ZERO, "full-2"),
        yes(ZERO_MORE, "full-3"),
        yes(FSDP, "full"),
    ),
    "LoRA": (
        yes(TRAINING + "test_trainer.py::{}", "test_without_a_sparse_adapter_it_is_a_trainer"),
        yes(DDP, "lora"),
        yes(ZERO_MORE, "lora-0"),
        yes(ZERO, "lora-2"),
        yes(ZERO, "lora-3"),
        yes(FSDP, "lora"),
    ),
    "zeroth order": (
        yes(ZEROTH, "_resume.py::test_a_killed_command_goes_on_in_another_process"),
        yes(ZEROTH, "_processes.py::test_z12_half_a_batch_each_is_one_process_with_the_whole"),
        *(NO_ZEROTH,) * 4,
    ),
}

BY_BASE_HEAD = (
    "NF4, FP4", "int8", "NF4 + DDP", "NF4 + FSDP2", "NF4 + ZeRO-2", "NF4 + ZeRO-3",
)  # fmt: skip
BY_BASE: Table = {
    "SpIEL, `growth: gradient`": (
        yes(PACKED, "nf4-spiel-gradient", "fp4-double-spiel-gradient"),
        yes(PACKED, "int8-spiel-gradient"),
        yes(COPIED, "packed-spiel"),
        yes(FSDP, "packed-spiel", "sharded-spiel"),
        yes(ZERO_MORE, "packed-spiel-2", "int8-spiel-2"),
        yes(ZERO_MORE, "packed-spiel-3", "sharded-spiel-3"),
    ),
    "SpIEL, `growth: momentum`": (
        yes(PACKED, "nf4-spiel-momentum"),
        yes(PACKED, "int8-spiel-momentum"),
        yes(COPIED, "packed-spiel-momentum"),
        yes(FSDP, "sharded-spiel-momentum"),
        *(NO_SM3,) * 2,
    ),
    "SpIEL, support chosen by batches": (
        yes(CHOSEN, "spiel-fisher"),
        yes(EIGHT, "spiel-fisher"),
        yes(COPIED, "packed-spiel-calibrated"),
        yes(FSDP, "sharded-spiel-calibrated"),
        yes(ZERO_MORE, "packed-spiel-calibrated-2"),
        NO_BACKWARD,
    ),
    "SpIEL, embeddings": (
        yes(PACKED, "nf4-spiel-embedding"),
        yes(PACKED, "int8-spiel-embedding"),
        yes(COPIED, "packed-spiel-embedding"),
        yes(FSDP, "sharded-spiel-embedding"),
        yes(ZERO_MORE, "packed-spiel-embedding-2"),
        yes(ZERO_MORE, "packed-spiel-embedding-3"),
    ),
    "S2FT": (
        yes(PACKED, "nf4-s2ft", "nf4-s2ft-output-side", "fp4-double-s2ft"),
        yes(PACKED, "int8-s2ft"),
        yes(COPIED, "packed-s2ft"),
        yes(FSDP, "sharded-s2ft"),
        yes(ZERO_MORE, "packed-s2ft-2"),
        yes(ZERO_MORE, "packed-s2ft-3"),
    ),
    "S2FT, units chosen by batches": (
        yes(CHOSEN, "s2ft-activation", "s2ft-product"),
        yes(EIGHT, "s2ft-activation", "s2ft-product"),
        yes(COPIED, "packed-s2ft-activation", "packed-s2ft-gradient"),
        yes(FSDP, "sharded-s2ft-activation", "sharded-s2ft-gradient"),
        yes(ZERO_MORE, "packed-s2ft-activation-2", "packed-s2ft-gradient-2"),
        yes(ZERO_MORE, "packed-s2ft-activation-3"),
    ),
    "S2FT, `layout: permuted`": (
        *(no(
            "packed weights can't be reordered",
            QUANTIZED, "test_the_permuted_layout_is_refused_with_the_layout_that_works",
        ),) * 6,
    ),
    "SoRA": (
        yes(PACKED, "nf4-sora", "fp4-double-sora"),
        yes(PACKED, "int8-sora"),
        yes(COPIED, "packed-sora"),
        yes(FSDP, "sharded-sora"),
        yes(ZERO_MORE, "packed-sora-2"),
        yes(ZERO_MORE, "packed-sora-3"),
    ),
    "SLTrain": (
        yes(PACKED, "nf4-sltrain", "fp4-double-sltrain"),
        yes(PACKED, "int8-sltrain"),
        yes(COPIED, "packed-sltrain"),
        yes(FSDP, "sharded-sltrain"),
        yes(ZERO_MORE, "packed-sltrain-2"),
        yes(ZERO_MORE, "packed-sltrain-3"),
    ),
    "full": (
        *(no(
            "packed weights don't train",
            QUANTIZED, "test_a_dense_method_over_packed_weights_is_refused",
        ),) * 6,
    ),
    "zeroth order over an adapter": (
        yes(QUANTIZED, FORWARD.format("nf4")),
        yes(QUANTIZED, FORWARD.format("int8")),
        yes(
            ENGINES + "test_fsdp.py::{}",
            "test_forward_passes_alone_train_copies_over_a_packed_base",
        ),
        *(NO_ZEROTH,) * 3,
    ),
}  # fmt: skip

BY_MEMORY_HEAD = ("checkpointed activations", "`offload.base`", "`offload.optimizer`")
BY_MEMORY: Table = {
    "SpIEL, `growth: gradient`": (yes(ONCE, "spiel"), yes(DISK, "spiel"), yes(HOST, "spiel")),
    "SpIEL, `growth: momentum`": (
        yes(ONCE, "spiel-momentum"), yes(DISK, "momentum"),
        no(
            "SM3's accumulators are not by entry",
            ENGINES + "test_offload.py::{}", "test_what_can_not_be_offloaded_is_refused",
        ),
    ),
    "SpIEL, support chosen by batches": (
        yes(ENGINES + "test_checkpointing.py::{}", "test_batches_choose_the_same_support"),
        yes(DISK, "calibrated"), yes(HOST, "calibrated"),
    ),
    "S2FT": (yes(ONCE, "s2ft"), yes(DISK, "s2ft"), yes(HOST, "s2ft")),
    "S2FT, `layout: permuted`": (
        yes(ONCE, "s2ft-permuted"), yes(DISK, "s2ft-permuted"), yes(HOST, "s2ft-permuted"),
    ),
    "SoRA": (yes(ONCE, "sora"), yes(DISK, "sora"), yes(HOST, "sora")),
    "SLTrain": (
        yes(EVERY, "test_checkpointing_activations_changes_nothing[sltrain]"),
        yes(DISK, "sltrain"), yes(HOST, "sltrain"),
    ),
}  # fmt: skip

TABLES: dict[str, tuple[tuple[str, ...], Table]] = {
    "engines": (BY_ENGINE_HEAD, BY_ENGINE),
    "bases": (BY_BASE_HEAD, BY_BASE),
    "memory": (BY_MEMORY_HEAD, BY_MEMORY),
}


def named_tests() -> set[str]:
    """Return all tests that a cell names; one of several cases by the function alone."""
    cells = (cell for _, table in TABLES.values() for row in table.values() for cell in row)
    return {test for cell in cells for test in cell.tests}


def shown(head: tuple[str, ...], table: Table) -> str:
    """Return a Markdown table, with the reasons of what does not run below it."""
    reasons: list[str] = []
    lines = [f"| method | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for row, cells in table.items():
        marks = [_mark(cell, reasons) for cell in cells]
        lines.append(f"| {row} | {' | '.join(marks)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def page(text: str) -> str:
    """Return the page with its tables made anew."""
    for name, (head, table) in TABLES.items():
        block = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(block, lambda m, h=head, t=table: m[1] + shown(h, t) + m[2], text, flags=re.S)
    return text


def _mark(cell: Cell, reasons: list[str]) -> str:
    if not cell.why:
        return "yes"
    if cell.why not in reasons:
        reasons.append(cell.why)
    return f"no ({reasons.index(cell.why) + 1})"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
