"""What lies off the device trains to the same bits, is never there at once, and comes back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from sft import OffloadConfig, S2FTConfig, SLTrainConfig, SoRAConfig, SparseTrainer, SpielConfig
from sft.engines.optimizer_state import named, names_of
from sft.offload.store import DiskStore
from sft.optim.offloaded import OffloadedOptimizer

LAYERS, WIDTH, INNER = 4, 64, 96
DISK, MEMORY = OffloadConfig(base="disk"), OffloadConfig(base="cpu")
STATE = OffloadConfig(optimizer="cpu")
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "spiel": (SpielConfig, {"density": 0.05, "reselect_every": 2, "window": 1}),
    "calibrated": (SpielConfig, {"density": 0.05, "selection": "gradient", "growth": "none"}),
    "s2ft": (S2FTConfig, {"ratio": 0.2, "selection": "weight"}),
    "s2ft-permuted": (S2FTConfig, {"ratio": 0.2, "layout": "permuted"}),
    "sora": (SoRAConfig, {"r": 4, "num_stages": 2, "strength": 0.5, "last_strength": 5.0}),
    "sltrain": (SLTrainConfig, {"density": 0.05, "r": 4}),
}
# whose optimizer's state stays
CASES_OF_BASES = CASES | {
    "momentum": (SpielConfig, {"density": 0.05, "reselect_every": 2, "window": 1,
                               "growth": "momentum"}),
}  # fmt: skip


FURTHER = ("momentum", "s2ft-permuted", "sltrain")  # which take longer than they tell


def marked(case, *values):
    return pytest.param(case, *values, marks=[pytest.mark.engines] if case in FURTHER else [])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def model(case="spiel", dtype=torch.float32):
    owner, settings = CASES_OF_BASES[case]
    return get_peft_model(base(dtype), owner(task_type="CAUSAL_LM", **settings))


def trainer(folder, adapted, offload=None, **settings):
    first = torch.randint(1, 64, (32, 1), generator=torch.Generator().manual_seed(1))
    ids = ((first + 3 * torch.arange(12)) % 63 + 1).tolist()
    arguments = {
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return SparseTrainer(
        model=adapted,
        args=TrainingArguments(str(folder), **arguments | settings),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        offload=offload,
    )


def own(adapted):
    return {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}


def own_of_file(loaded):
    return {n: p.detach() for n, p in loaded.named_parameters() if "delta_values" in n}


def frozen(adapted):
    return {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}


def assert_equal(left, right):
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name


class Alive:
    """Gauges the bytes of weights that a store has read and that are still somewhere."""

    def __init__(self, offloaded) -> None:
        self.now = self.most = 0
        store, read = offloaded._store, offloaded._store.read

        def gauge(key):
            tensor = read(key)
            self.now += tensor.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(tensor.untyped_storage(), self.gone, tensor.nbytes)
            return tensor

        store.read = gauge

    def gone(self, count):
        self.now -= count


# -- the base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*map(marked, CASES), marked("momentum")])
def test_a_base_on_disk_trains_to_the_same_bits(case, tmp_path) -> None:
    found = {}
    for name, offload in {"memory": MEMORY, "disk": DISK, "whole": None}.items():
        adapted = model(case)
        before = frozen(adapted)
        run = trainer(tmp_path / name, adapted, offload)
        run.train()
        if offload is not None:
            assert all(p.numel() == 0 for n, p in adapted.named_parameters() if "base_layer" in n)
            run.offloaded_base.close()
        assert_equal(frozen(adapted), before)
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        found[name] = own(adapted), losses
    assert_equal(found["disk"][0], found["memory"][0])
    # aside, which rounds otherwise than weights that hold their deltas
    assert found["disk"][1] == pytest.approx(found["whole"][1], abs=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_weights_are_alive_only_where_they_are_read(checkpointed, tmp_path) -> None:
    run = trainer(tmp_path, model(), DISK, activation_checkpointing=checkpointed)
    alive = Alive(run.offloaded_base)
    run.train()
    attention, inner = WIDTH * WIDTH * 4, WIDTH * INNER * 4
    block = 4 * attention + 3 * inner
    # one at work and one on its way; a block that is recomputed is whole
    assert 2 * inner <= alive.most <= (block + 3 * inner if checkpointed else 3 * inner)
    assert alive.most < 4 * run.offloaded_base.numel == LAYERS * block + 128 * WIDTH * 4


def test_files_hold_the_base_and_go(tmp_path) -> None:
    adapted = model()
    before = frozen(adapted)
    run = trainer(tmp_path, adapted, DISK)
    files = list((tmp_path / "offload").glob("*/*"))
    assert sum(file.stat().st_size for file in files) == 4 * run.offloaded_base.numel > 0
    run.offloaded_base.close()
    run.offloaded_base.close()
    assert not list((tmp_path / "offload").iterdir())
    assert_equal(frozen(adapted), before)
    adapted(input_ids=torch.tensor([[1, 2]]))


def test_files_of_a_killed_process_are_swept(tmp_path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    store = DiskStore(tmp_path, torch.device("cpu"))
    mine = store.folder.name
    dead = tmp_path / mine.replace(f"-{os.getpid()}-", f"-{killed.pid}-")
    dead.mkdir()
    (dead / "0").write_bytes(b"weights")
    other = DiskStore(tmp_path, torch.device("cpu"))
    assert {path.name for path in tmp_path.iterdir()} == {mine, other.folder.name}
    del store, other
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_is_refused(tmp_path) -> None:
    store = DiskStore(tmp_path, torch.device("cpu"))
    store.put(0, torch.arange(8.0))
    assert torch.equal(store.read(0), torch.arange(8.0))
    (store.folder / "0").write_bytes(b"short")
    with pytest.raises(OSError, match=r"ends after 5 of 32 bytes"):
        store.read(0)


def test_the_next_weight_is_on_its_way(tmp_path) -> None:
    run = trainer(tmp_path, model(), DISK, max_steps=1)
    run.train()
    assert run.offloaded_base.hits < 10
    run = trainer(tmp_path, model(), DISK, max_steps=3)
    run.train()
    # 29 weights forward, and backward all but the embedding and the first layer's three
    assert run.offloaded_base.hits >= 2 * (29 + 20)


def test_a_base_on_disk_resumes_exactly_and_its_adapter_loads(tmp_path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole, again = model(), model()
    run = trainer(tmp_path / "whole", whole, DISK, **settings)
    run.train()
    resumed = trainer(tmp_path / "again", again, DISK, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(own(again), own(whole))
    whole.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    run.offloaded_base.close()
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, whole.eval()(**inputs).logits)
        merged = whole.merge_and_unload()(**inputs).logits
        torch.testing.assert_close(merged, loaded(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.engines
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
def test_an_adapted_embedding_is_saved_with_its_table(tmp_path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    config = SpielConfig(density=0.05, target_modules=["embed_tokens", "q_proj"], growth="none")
    whole, again = (get_peft_model(base(), config) for _ in range(2))
    table = base().get_input_embeddings().weight
    run = trainer(tmp_path / "whole", whole, DISK, **settings)
    run.train()
    assert run.offloaded_base.numel > table.numel()
    assert whole.get_input_embeddings().base_layer.weight.numel() == 0
    resumed = trainer(tmp_path / "again", again, DISK, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(own(again), own(whole))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "whole" / "checkpoint-4")
    assert_equal(own_of_file(loaded), own(whole))
    assert torch.equal(loaded.get_input_embeddings().base_layer.weight, table)


def test_a_forward_that_raises_leaves_nothing_behind(tmp_path) -> None:
    adapted = model()
    run = trainer(tmp_path, adapted, DISK)
    layer = adapted.get_base_model().model.layers[1].mlp.act_fn
    handle = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    handle.remove()
    run.train()
    assert all(p.numel() == 0 for n, p in adapted.named_parameters() if "base_layer" in n)


# -- the optimizer -------------------------------------------------------------------------------


# the default leaves the choice to the method: SpIEL steps by our own AdamW
@pytest.mark.parametrize(
    ("case", "optim"),
    [*(marked(case, "adamw_torch_fused") for case in CASES), ("spiel", "adamw_torch")],
)
def test_state_on_the_cpu_is_the_same_state(case, optim, tmp_path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "optim": optim}
    plain, away, again = model(case), model(case), model(case)
    trainer(tmp_path / "plain", plain, **settings).train()
    trainer(tmp_path / "away", away, STATE, **settings).train()
    assert_equal(own(away), own(plain))
    resumed = trainer(tmp_path / "again", again, STATE, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "away" / "checkpoint-2"))
    assert_equal(own(again), own(plain))


def test_state_that_another_engine_saved_goes_to_the_cpu(tmp_path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    plain, again = model(), model()
    run = trainer(tmp_path / "plain", plain, **settings)
    run.train()
    checkpoint = tmp_path / "plain" / "checkpoint-2"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    groups = [group["params"] for group in run.optimizer.param_groups]
    save_file(named(saved, groups, names_of(plain)), checkpoint / "sft_optimizer.safetensors")
    resumed = trainer(tmp_path / "again", again, STATE, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(own(again), own(plain))


def test_base_and_state_go_together(tmp_path) -> None:
    both, one = model(), model()
    trainer(tmp_path / "one", one, DISK).train()
    trainer(tmp_path / "both", both, OffloadConfig(base="disk", optimizer="cpu")).train()
    assert_equal(own(both), own(one))


def test_half_precision_keeps_a_master(tmp_path) -> None:
    """Steps far below the rounding of bfloat16 add up, also across a save and a load."""
    values = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))

    def build():
        return OffloadedOptimizer(torch.optim.SGD([values], lr=1.0))

    optimizer = build()
    for step in range(64):
        if step == 32:
            state = optimizer.state_dict()
            optimizer = build()
            optimizer.load_state_dict(state)
        values.grad = torch.full_like(values, 2.0**-12)
        optimizer.step()
    assert values.dtype == torch.bfloat16
    assert torch.equal(values.float(), torch.full((5,), 1 - 64 * 2.0**-12))
    with torch.no_grad():
        values[0] = 3.0  # by somebody else
    values.grad = torch.zeros_like(values)
    optimizer.step()
    assert values.tolist() == [3.0] + 4 * [1 - 2.0**-6]


# -- what is refused -----------------------------------------------------------------------------


def test_what_can_not_be_offloaded_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"offload.base: got 'gpu', allowed is one of cpu, disk"):
        OffloadConfig(base="gpu")
    with pytest.raises(ValueError, match=r"offload: got neither base nor optimizer"):
        OffloadConfig()
    with pytest.raises(ValueError, match=r"offload.folder: got 'x' with base='cpu'"):
        OffloadConfig(base="cpu", folder="x")
    with pytest.raises(ValueError, match=r"offload.base: got torch.float32 weights under bf16"):
        trainer(tmp_path, model(), DISK, bf16=True)
    with pytest.raises(ValueError, match=r"offload.base: got a model without a frozen weight"):
        trainer(tmp_path, base(), DISK)
    adapted = get_peft_model(base(), SpielConfig(optimizer="sm3", growth="momentum"))
    with pytest.raises(ValueError, match=r"offload.optimizer: got SM3"):
        trainer(tmp_path, adapted, STATE).train()
