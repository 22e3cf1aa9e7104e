"""Training runs under DDP in two processes on the CPU, started by torchrun.

torchrun --standalone --nproc_per_node 2 ddp_run.py FOLDER
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def load(path: Path) -> Any:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


cases = load(HERE / "ddp_cases.py")
laboratory = load(HERE.parent / "sft" / "training" / "conftest.py")
CUT = 4  # an update inside a window


def all_cases(lab: Any, rank: int) -> dict[str, Any]:
    """Train every case; this process begins with weights and adapters of its own."""
    found = {}
    for name in cases.MODELS:
        saving = {"save_strategy": "steps", "save_steps": CUT} if name == "spiel" else {}
        trainer = cases.build(name, lab, name, processes=2, **saving)
        if rank == 1:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(1)  # codes of packed weights as well
        trainer.train()
        found[name] = cases.left_by(trainer)
        found[name]["buffers sent"] = trainer.model_wrapped.broadcast_buffers
    return found


def resumed(lab: Any) -> dict[str, Any]:
    trainer = cases.build("spiel", lab, "again", processes=2)
    trainer.train(lab.checkpoint("spiel", CUT))
    return cases.left_by(trainer)


def refusals(lab: Any, rank: int) -> dict[str, str]:
    """Return what is said of that which cannot be."""
    from sft.adapters.deltas.mean_outer import shared
    from sft.adapters.ranks import ProcessGroup
    from sft.kernels.outer import DenseOuter

    ranks = ProcessGroup(torch.device("cpu"))
    outer = DenseOuter(torch.ones(3, 2), torch.ones(3, 2))
    return {
        "compaction": message(
            lambda: lab.trainer(
                "no", model=cases.peft("SoRAConfig", r=4, compact_after=2)(lab)
            ).train()
        ),
        "per layer": message(
            lambda: lab.trainer(
                "no", model=cases.peft("SLTrainConfig", r=4, per_layer_updates=True)(lab)
            ).train()
        ),
        "elsewhere": message(lambda: shared(outer, ranks, f"experts.{rank}")),
        "apart": message(lambda: ranks.check_alike("supports", rank)),
        "alike": message(lambda: ranks.check_alike("supports", 7)),
    }


def message(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rows_seen(lab: Any) -> list[list[int]]:
    """Return the rows that this process reads in one epoch."""
    trainer = cases.build("spiel", lab, "rows", processes=2)
    batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    return torch.cat(batches).tolist()


def window(rank: int) -> dict[str, Any]:
    """Return a window of whose second update this process saw nothing, if it is the second one."""
    from types import SimpleNamespace

    from sft.adapters.deltas.window import Window, share_updates
    from sft.adapters.ranks import ProcessGroup
    from sft.kernels.outer import DenseOuter
    from sft.kernels.pattern import Pattern

    generator = torch.Generator().manual_seed(rank)
    ranks, found = ProcessGroup(torch.device("cpu")), {}
    for whole in (False, True):
        site = SimpleNamespace(pattern=Pattern(torch.arange(0, 10, 2), (8, 6)), tap=None)
        one = Window(site, include_active=False, whole_update=whole, name="layer", ranks=ranks)
        outers = []
        for update in range(3):
            left, right = (torch.randn(7, n, generator=generator) for n in (8, 6))
            outers.append((left.t() @ right).flatten())
            if update == 2 or (update == 1 and rank == 1) or (whole and rank == 1):
                outers[-1].zero_()
            else:
                one.observe(DenseOuter(left, right))
            share_updates([one], ranks)
            one.close_update(1.0)
        found[f"{whole}"] = {
            "candidates": one.candidates, "updates": one.updates, "gradients": outers,
            "total": one.total, "square": one.total_square,
        }  # fmt: skip
    return found


def main(folder: Path) -> None:
    """Do everything, and leave what was found."""
    import os

    torch.set_num_threads(1)
    lab, rank = laboratory.Lab(folder), int(os.environ["RANK"])
    found: dict[str, Any] = {"cases": all_cases(lab, rank)}
    found["resumed"] = resumed(lab)
    found["refused"] = refusals(lab, rank)
    found["rows"] = rows_seen(lab)
    found["window"] = window(rank)
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.barrier()  # nobody leaves while another still speaks
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
