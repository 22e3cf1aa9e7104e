"""The callback alone: what it refuses, and what it makes of loss scales and several adapters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from sft.adapters.ranks import ALONE


class Two:
    """Two ranks, as one of them sees them where both are alike."""

    rank, count = 0, 2

    def mean(self, tensor):
        return tensor.clone()

    def gather(self, numbers):
        return [list(numbers)] * 2

    def check_alike(self, what, checksum):
        pass


def begin(lab, model, ranks=ALONE):
    """Call the callback as the Trainer does when training begins."""
    from sft import SparseCallback
    from sft.engines.plain import PlainEngine

    trainer = lab.trainer(model=model)
    state = SimpleNamespace(global_step=0, max_steps=12)
    callback, optimizer = SparseCallback(), trainer.create_optimizer()
    callback.engine = PlainEngine(optimizer, ranks)
    callback.on_train_begin(
        trainer.args,
        state,
        None,
        model,
        train_dataloader=trainer.get_train_dataloader(),
        optimizer=optimizer,
    )


def test_what_one_process_alone_can_do_is_refused_before_a_weight_is_written(lab, assert_equal):
    from sft import SoRAConfig

    config = SoRAConfig(r=4, compact_after=2, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(lab.base(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^compact_after: got 2 on several processes") as caught:
        begin(lab, model, Two())
    assert "\n" not in str(caught.value)
    assert_equal({name: p.detach() for name, p in model.named_parameters()}, before)


@pytest.mark.parametrize("growth", ["none", "gradient", "momentum"])
def test_processes_may_share_a_support(lab, growth):
    from sft.adapters.layer import sparse_layers

    model = lab.adapted(growth=growth)
    begin(lab, model, Two())
    assert all(layer.content is not None for layer in sparse_layers(model).values())


def test_processes_with_different_supports_are_refused(lab):
    class Apart(Two):
        def check_alike(self, what, checksum):
            assert what == "supports"
            raise RuntimeError("supports: differs")

    with pytest.raises(RuntimeError, match="supports: differs"):
        begin(lab, lab.adapted(), Apart())


def test_several_gpus_in_one_process_are_refused(lab, assert_equal, monkeypatch):
    """Their replicas would write one another's weights."""
    base = lab.base()
    pristine, model = lab.weights(base), lab.adapted(base, init_weights=False, growth="none")
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(ValueError, match=r"^n_gpu: got 2 in one process") as caught:
        begin(lab, model)
    assert "\n" not in str(caught.value)
    assert_equal(lab.weights(model), pristine)


class Scaled:
    """An optimizer as accelerate wraps it, with a loss scale."""

    def __init__(self, optimizer, scale):
        self.optimizer, self.factor = optimizer, scale
        self.step_was_skipped = False


def one_window(lab, scale, skip=(), clip=1.0):
    """Run the updates of one window by hand; return the supports that grew and the first seeds."""
    from sft import SparseCallback
    from sft.adapters.layer import sparse_layers
    from sft.optim.adamw import SparseAdamW

    model = lab.adapted(reselect_every=8, window=4, candidates_from="micro_batch")
    parameters = [p for p in model.parameters() if p.requires_grad]
    # so small an eps leaves the update independent of the scale of the gradients, to the bit
    optimizer = Scaled(SparseAdamW(parameters, lr=1e-2, eps=1e-30), scale)
    args, state = lab.arguments("run"), SimpleNamespace(global_step=0, max_steps=12)
    callback = SparseCallback()
    callback.on_train_begin(args, state, None, model, train_dataloader=None, optimizer=optimizer)
    rows = torch.tensor(lab.dataset(16)["input_ids"])
    for step in range(4):
        callback.on_step_begin(args, state, None)
        batch = rows[4 * step : 4 * step + 4]
        loss = model(input_ids=batch, labels=batch).loss * optimizer.factor
        optimizer.step_was_skipped = step in skip
        (loss * (float("inf") if step in skip else 1.0)).backward()
        if step in skip:
            optimizer.factor /= 2  # as GradScaler does, before the callback hears of it
        else:
            for parameter in parameters:
                parameter.grad *= clip / optimizer.factor
            optimizer.optimizer.step()
        callback.on_optimizer_step(args, state, None, model, optimizer=optimizer)
        model.zero_grad()
        state.global_step += 1
        callback.on_step_end(args, state, None, optimizer=optimizer)
    callback.finish(model)
    layer = next(iter(sparse_layers(model).values()))
    assert callback.replaced
    return lab.deltas(model), lab.optimizer_state(optimizer.optimizer), layer


def test_a_loss_scale_changes_nothing(lab, assert_equal):
    """A power of two, so that not even rounding differs."""
    plain, plain_state, _ = one_window(lab, 1.0)
    scaled, scaled_state, _ = one_window(lab, 1024.0)
    assert_equal(plain, scaled)
    assert_equal(plain_state, scaled_state)


def test_grown_weights_start_on_the_scale_that_clipping_left(lab, assert_equal):
    """Clipping by norm multiplies every gradient by one factor, here a power of two."""
    plain, plain_state, _ = one_window(lab, 1.0)
    clipped, clipped_state, _ = one_window(lab, 1.0, clip=0.25)
    indices = [name for name in plain if "indices" in name]
    assert_equal({n: plain[n] for n in indices}, {n: clipped[n] for n in indices})
    power = {"exp_avg": 1, "exp_avg_sq": 2, "age": 0}
    for name, state in plain_state.items():
        key = name.rpartition(".")[2].rpartition("/")[2]
        if key in power:
            assert_equal({name: state * 0.25 ** power[key]}, {name: clipped_state[name] * 1.0})
    assert any(name.endswith("exp_avg_sq") for name in plain_state)


@pytest.mark.parametrize("skipped", [0, 2])
def test_skipped_updates_do_not_enter_the_window(lab, skipped):
    deltas, state, _ = one_window(lab, 1024.0, skip={skipped})
    ages = torch.cat([age for name, age in state.items() if name.endswith("age")])
    assert ages.unique().tolist() == [3], "three of the four updates of the window counted"
    for name, value in state.items():
        if not name.endswith("age"):
            assert torch.isfinite(value).all(), name
            assert value.any(), name
    assert all(torch.isfinite(t).all() for t in deltas.values())


def test_of_two_adapters_the_active_one_trains(lab, assert_equal):
    from sft import SpielConfig

    def run(out, resume=None, **more):
        model = lab.adapted(init_weights=False)
        model.add_adapter("other", SpielConfig(density=0.02, reselect_every=4, window=2, seed=1))
        model.set_adapter("other")
        before = lab.deltas(model)
        return lab.run(out, resume, model=model, **more), before

    whole, before = run("whole", save_strategy="steps", save_steps=5)
    after = lab.deltas(whole.model)
    untouched = [name for name in after if name.endswith(".default")]
    assert_equal({n: after[n] for n in untouched}, {n: before[n] for n in untouched})
    moved = [n for n in after if n.endswith("delta_values.other")]
    assert all(after[name].any() for name in moved)
    count = sum(after[name].numel() for name in moved)
    assert whole.replaced[2] == count
    resumed, _ = run("whole", lab.checkpoint("whole", 5))
    assert_equal(lab.deltas(resumed.model), after)


def test_one_callback_is_enough(lab):
    from sft import SparseCallback

    mine = SparseCallback()
    trainer = lab.trainer(trainer={"callbacks": [mine]})
    assert trainer.sparse_callback is mine
    trainer.train()
    assert sorted(mine.replaced) == [2, 6, 10]


def test_with_resident_an_error_in_a_stock_trainer_restores_the_base(lab, assert_equal):
    from sft import SparseCallback, resident

    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 4:
                raise RuntimeError("stop")

    base = lab.base()
    pristine = lab.weights(base)
    trainer = lab.trainer(base=base, cls=Trainer, trainer={"callbacks": [SparseCallback(), Fail()]})
    with pytest.raises(RuntimeError, match="stop"), resident(trainer.model):
        trainer.train()
    assert_equal(lab.weights(trainer.model), pristine)


def test_a_dense_head_trains_beside_the_deltas(lab, assert_equal):
    def run(out, resume=None, **more):
        base = lab.base("LlamaForSequenceClassification", num_labels=3)
        data = {"train_dataset": lab.dataset(labels=3)}
        model = lab.adapted(base, task_type="SEQ_CLS", **method)
        return lab.run(out, resume, model=model, trainer=data, **more)

    for method in ({}, {"growth": "momentum"}):
        out = method.get("growth", "gradient")
        whole = run(out, save_strategy="steps", save_steps=5)
        head = whole.model.base_model.model.score
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
        resumed = run(out, lab.checkpoint(out, 5))
        assert_equal(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
        assert_equal(lab.optimizer_state(whole.optimizer), lab.optimizer_state(resumed.optimizer))


def test_optimizer_arguments_that_nothing_reads_are_refused(lab):
    with pytest.raises(ValueError, match=r"^optim_args: got 'amsgrad=True'"):
        lab.trainer(optim_args="amsgrad=True").train()


def test_a_checkpoint_without_the_optimizer_is_not_resumed_from(lab):
    lab.run(save_strategy="steps", save_steps=5, save_only_model=True)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*save_only_model=True"):
        lab.run(resume=lab.checkpoint("run", 5))
