"""Training runs under FSDP2 in two processes on the CPU, started by torchrun.

accelerate passes over FSDP where the processes are on CPUs. Told that these are GPUs, on a device
that is the CPU, it goes the very way that it goes on GPUs.

    torchrun --standalone --nproc_per_node 2 fsdp_run.py FOLDER FOLDER_OF_ONE_PROCESS CASE...
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def load(path: Path) -> Any:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


cases = load(HERE / "ddp_cases.py")
packed_cases = load(HERE / "packed_cases.py")
packed_cases.add_to(cases)
laboratory = load(HERE.parent / "sft" / "training" / "conftest.py")


class FsdpLab(laboratory.Lab):
    """A laboratory whose trainers shard."""

    def arguments(self, out: str, **settings: Any) -> Any:
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        config = {"version": 2}
        args = super().arguments(out, fsdp=True, fsdp_config=config, **settings)
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return args


def shapes(trainer: Any) -> dict[str, Any]:
    """Return how much of parameters and of the optimizer's state lies in this process."""
    from sft.optim.shards import local

    state = trainer.optimizer.optimizer.state
    model = trainer.model
    return {
        "kinds": sorted({type(p).__name__ for p in model.parameters()}),
        "parameters": sum(local(p).numel() for p in model.parameters()),
        "all_parameters": sum(p.numel() for p in model.parameters()),
        "state": sum(
            local(t).numel()
            for values in state.values()
            for t in values.values()
            if isinstance(t, torch.Tensor) and t.dim()
        ),
    }


def pristine(trainer: Any, base: Any) -> bool:
    """Tell whether every frozen weight is, bit for bit, what it was."""
    from sft.optim.shards import whole

    before = {name: p.detach() for name, p in base.named_parameters()}
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): whole(p).detach()
        for name, p in trainer.model.named_parameters()
        if not p.requires_grad
    }
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)


def finish(trainer: Any, out: Path, resume: Path | None = None) -> dict[str, Any]:
    """Train, leave the adapter in a folder, and say what was seen."""
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.save_model(str(out / "saved"))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"losses": losses, "replaced": trainer.sparse_callback.replaced, **shapes(trainer)}


def run(lab: Any, name: str, **settings: Any) -> dict[str, Any]:
    """Train a case."""
    out, name = name, name.removeprefix("ddp-")
    if out != name:  # the same in whole copies
        lab = laboratory.Lab(lab.folder)
    trainer = cases.build(name, lab, out, processes=2, **settings)
    found = finish(trainer, lab.folder / out)
    if name == "spiel":
        found["pristine"] = pristine(trainer, lab.base())
    return found


def resumed(lab: Any, name: str = "again", where: Path | None = None) -> dict[str, Any]:
    """Go on from the middle of a window."""
    where = where or lab.folder / "spiel"
    trainer = cases.build("spiel", lab, name, processes=2)
    return finish(trainer, lab.folder / name, where / "checkpoint-4")


def best(lab: Any) -> dict[str, Any]:
    """End with the worst checkpoint, which is called the best."""
    trainer = lab.trainer(
        "best", max_steps=6, per_device_train_batch_size=4, trainer={
            "train_dataset": cases.rows(lab), "eval_dataset": lab.dataset(8)
        }, model=cases.peft("SpielConfig", **cases.GROW)(lab),
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    found = finish(trainer, lab.folder / "best")
    return {**found, "best": Path(trainer.state.best_model_checkpoint).name}


def half(lab: Any) -> dict[str, Any]:
    """Train fp32 values over a base in bfloat16."""
    model = cases.peft("SpielConfig", lambda lab: lab.base().bfloat16(), **cases.GROW)(lab)
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": True}
    trainer = lab.trainer(
        "half", model=model, trainer={"train_dataset": cases.rows(lab)}, **settings
    )
    found = finish(trainer, lab.folder / "half")
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    found["dtypes"] = sorted({str(p.dtype) for p in trained})
    return {**found, "pristine": pristine(trainer, lab.base().bfloat16())}


def forward(lab: Any) -> dict[str, Any]:
    """Train an adapter without gradients, in whole copies of a packed base."""
    lab = laboratory.Lab(lab.folder)
    trainer = packed_cases.by_forward_passes(cases, lab, "forward", processes=2)
    return finish(trainer, lab.folder / "forward")


def refused(lab: Any) -> dict[str, Any]:
    """Ask for what can't be sharded."""
    model = cases.peft("S2FTConfig", roles=["down"], density=0.5, layout="permuted")(lab)
    return finish(lab.trainer("refused", model=model), lab.folder / "refused")


def offloaded(lab: Any) -> dict[str, Any]:
    """Shard by hand, with an offload policy, in a loop without a Trainer."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    from sft.optim.adamw import SparseAdamW
    from sft.optim.shards import whole

    ids = torch.tensor(lab.dataset(8)["input_ids"])
    mine = ids.chunk(2)[torch.distributed.get_rank()]
    ended = []
    for batch, shard in ((ids, False), (mine, True)):
        model = cases.peft("SpielConfig", density=0.1)(lab)
        policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
        for block in [*model.base_model.model.model.layers, model] if shard else []:
            fully_shard(block, **policy)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = SparseAdamW(trained, lr=1e-2, eps=1e-5)
        for _ in range(3):
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.05)
            optimizer.step()
            optimizer.zero_grad()
        ended.append(torch.cat([whole(p).detach() for p in trained]))
    return {"moved": float(ended[0].abs().max()), "error": float((ended[0] - ended[1]).abs().max())}


cases.MODELS["sora-l1"] = (cases.peft("SoRAConfig", r=4, l1=0.5), {"max_steps": 3})
cases.MODELS["spiel-few"] = (
    cases.peft("SpielConfig", num_weights=14, reselect_every=2, window=1),
    {"max_steps": 4},
)
# (lab, folder of the runs of one process)
SPECIAL: dict[str, Any] = {
    "forward": lambda lab, alone: forward(lab),
    "again": lambda lab, alone: resumed(lab),
    "from-plain": lambda lab, alone: resumed(lab, "from-plain", alone / "spiel"),
    "best": lambda lab, alone: best(lab),
    "half": lambda lab, alone: half(lab),
    "refused": lambda lab, alone: refused(lab),
    "offloaded": lambda lab, alone: offloaded(lab),
}
# Adam's step of a tiny gradient is its sign, which a sum in another order may turn
CALM = {"adam_epsilon": 1e-5}
SETTINGS: dict[str, dict[str, Any]] = {
    "spiel": {"save_strategy": "steps", "save_steps": 4},
    "sora": CALM,
    "sora-l1": CALM,
    "full": CALM,
    "packed-sora": CALM,
    "sharded-sora": CALM,
}


def main() -> None:
    folder, alone, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    lab, found = FsdpLab(folder), {}
    for name in names:
        try:
            special = SPECIAL.get(name)
            given = SETTINGS.get(name.removeprefix("ddp-"), {})
            found[name] = special(lab, alone) if special else run(lab, name, **given)
        except ValueError as error:
            found[name] = {"error": str(error)}
        torch.distributed.barrier()
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # nobody leaves while another still speaks
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
