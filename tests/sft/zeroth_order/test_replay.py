"""Replay: base and log give the run's weights, bit for bit (Z9); deltas of whole models (M9)."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sft.cli import app
from sft.export.replay import replay
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.log import KEY, ZerothOrderLog
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.trained import trained_set
from sft.recipe.load import load_recipe
from sft.run.job import train_from_recipe
from sft.zeroth_order.log import weights_sha
from sft.zeroth_order.replay import find_log, load_log, replay_onto

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
METHODS = {
    "full": "{name: full}",
    "lora": "{name: lora, r: 2, target_modules: [q_proj, v_proj]}",
    "sparse": "{name: spiel, growth: none, density: 0.1}",
    "part": "{name: full, modules: [q_proj]}",
    "prompt": "{name: prompt_tuning, num_virtual_tokens: 2}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """Train a method by forward passes once; return the folder of the run."""
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{a} ->", "completion": f" {b}"} for a in numbers for b in numbers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""\
model: {{name: {tiny_model}}}
method: {{name: full}}
zeroth_order: {{eps: 1e-2}}
data: {{train: {folder}/rows.jsonl, eval_examples: 4}}
evaluation: {{metrics: []}}
training:
  max_steps: 6
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  weight_decay: 0.1
  logging_steps: 2
  save_strategy: no
"""
    )

    def run(name: str, *settings: str) -> Path:
        output = folder / name
        if not output.exists():
            given = [*settings, f"training.output_dir={output}"]
            recipe = load_recipe(folder / "recipe.yaml", given)
            train_from_recipe(recipe, Console(file=io.StringIO()))
        return output

    return run


@pytest.fixture
def run_of(runs):
    return lambda kind: runs(kind, f"method={METHODS[kind]}")


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def same(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_another_process_with_more_threads_rebuilds_the_weights(run_of, tmp_path) -> None:
    run, to = run_of("full"), tmp_path / "merged"
    done = subprocess.run(
        [sys.executable, "-m", "sft", "replay", str(run), "--to", str(to)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "6 updates replayed" in done.stdout
    assert done.stdout.endswith("the weights are the run's, bit for bit\n")
    assert (to / MODEL).read_bytes() == (run / "merged" / MODEL).read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in to.iterdir()
    }


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_an_adapter_is_rebuilt_from_where_it_started(run_of, kind, tmp_path) -> None:
    run = run_of(kind)
    done = replay(run, to=tmp_path / "adapter", form="adapter")
    assert (done.updates, done.proven) == (6, True)
    assert same(tmp_path / "adapter" / ADAPTER, run / "adapter" / ADAPTER)
    assert not same(tmp_path / "adapter" / ADAPTER, run / "zeroth_order/start" / ADAPTER)
    replay(run / "zeroth_order", to=tmp_path / "merged")
    assert same(tmp_path / "merged" / MODEL, run / "merged" / MODEL)


def test_a_part_of_the_log_gives_the_weights_of_that_update(runs, tmp_path) -> None:
    constant = "training.lr_scheduler_type=constant"
    whole, half = runs("whole", constant), runs("half", constant, "training.max_steps=3")
    done = replay(whole, to=tmp_path / "three", until=3)
    assert (done.updates, done.proven) == (3, None)
    assert same(tmp_path / "three" / MODEL, half / "merged" / MODEL)
    printed = command("replay", whole, "--to", tmp_path / "none", "--until", "0").stdout
    assert printed.endswith("; the log notes no hash of the weights there\n")
    base = load_log(find_log(whole)).header["model"]
    assert same(tmp_path / "none" / MODEL, Path(base) / MODEL)


def test_a_cast_is_of_the_merged_weights(run_of, tmp_path) -> None:
    run = run_of("full")
    printed = command("replay", run, "--to", tmp_path / "half", "--dtype", "bfloat16").stdout
    assert "; the weights before the cast to bfloat16 are the run's, bit for bit" in printed
    merged, cast = load_file(run / "merged" / MODEL), load_file(tmp_path / "half" / MODEL)
    assert all(torch.equal(merged[name].bfloat16(), cast[name]) for name in merged)


def test_a_delta_holds_what_changed_and_nothing_else(runs, tiny_model, tmp_path) -> None:
    run = runs("masked", "zeroth_order.sparsity=0.75", "model.dtype=bfloat16")
    base = {n: t.bfloat16() for n, t in load_file(tiny_model / MODEL).items()}
    done = replay(run, to=tmp_path / "delta", form="delta")
    parts, merged = (
        load_file(tmp_path / "delta/delta.safetensors"),
        load_file(run / "merged" / MODEL),
    )
    written = {name: tensor.clone() for name, tensor in base.items()}
    for name in {key.rpartition(".")[0] for key in parts}:
        indices, values = parts[f"{name}.indices"], parts[f"{name}.values"]
        assert indices.dtype == torch.int32
        assert bool((indices.diff() > 0).all())
        assert bool((base[name].flatten()[indices.long()] != values).all())
        written[name].view(-1)[indices.long()] = values
    assert all(torch.equal(written[name], merged[name]) for name in merged)
    share = sum(len(t) for n, t in parts.items() if n.endswith("values")) / 21024
    assert 0.15 < share < 0.27
    assert f"{100 * share:.2f} %" in done.detail
    before = (tiny_model / MODEL).read_bytes()
    options = ["--base", tiny_model, "--to", "merged", "--out", tmp_path / "out"]
    result = command("export", tmp_path / "delta", *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / MODEL).read_bytes() == (run / "merged" / MODEL).read_bytes()
    assert (tiny_model / MODEL).read_bytes() == before


def test_a_delta_is_merged_in_small_files_and_unverified_where_asked(runs, tmp_path) -> None:
    run = runs("masked", "zeroth_order.sparsity=0.75", "model.dtype=bfloat16")
    replay(run, to=tmp_path / "delta", form="delta")
    options = ["--to", "merged", "--max-shard-size", "20KB", "--no-verify"]
    result = command("export", tmp_path / "delta", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "a stock model\n" in result.output and "logit difference" not in result.output
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    merged = load_file(run / "merged" / MODEL)
    assert parts.keys() == merged.keys()
    assert all(torch.equal(parts[name], merged[name]) for name in merged)


@pytest.fixture
def other_base(tiny_model, tmp_path):
    """Write the base with one weight changed in its last bit."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / MODEL)
    tensors["model.norm.weight"][3] = tensors["model.norm.weight"][3].nextafter(torch.tensor(2.0))
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    return folder


def refused(*arguments) -> str:
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_another_base_is_refused(run_of, runs, other_base, tmp_path) -> None:
    to = tmp_path / "to"
    line = refused("replay", run_of("full"), "--base", other_base, "--to", to)
    assert line.startswith("sft: base: its weights are others than those the run started from; ")
    replay(run_of("full"), to=tmp_path / "delta", form="delta")
    line = refused(
        "export", tmp_path / "delta", "--base", other_base, "--to", "merged", "--out", to
    )
    assert "is of another base" in line
    config = json.loads((other_base / "config.json").read_text())
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = LlamaConfig(**{**config, "intermediate_size": 96})
    LlamaForCausalLM(wider).save_pretrained(other_base)
    line = refused("replay", run_of("full"), "--base", other_base, "--to", to)
    assert "mlp.gate_proj.weight has shape [96, 32], the run's [64, 32]" in line
    assert not to.exists()


@pytest.mark.parametrize("kind", ["lora", "sparse", "part"])
def test_frozen_weights_have_to_be_those_of_the_run(run_of, kind, other_base, tmp_path) -> None:
    run = run_of(kind)
    line = refused("replay", run, "--base", other_base, "--to", tmp_path / "to")
    assert line.startswith("sft: base: its weights are others than those the run started from; ")
    if kind == "part":
        replay(run, to=tmp_path / "delta", form="delta")
        line = refused(
            "export",
            tmp_path / "delta",
            "--base",
            other_base,
            "--to",
            "merged",
            "--out",
            tmp_path / "to",
        )
        assert "is of another base" in line
    assert not (tmp_path / "to").exists()


def test_what_is_read_is_never_replaced(run_of, tiny_model, tmp_path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(run_of("full"), run)
    shutil.copytree(tiny_model, base)
    for to, names in ((run, "log"), (run / "zeroth_order", "log"), (base, "base")):
        line = refused("replay", run, "--base", base, "--to", to, "--overwrite")
        assert re.search(rf"--to: {to}: would replace .*{names}.*, which is read; give an", line)
    line = refused("replay", run, "--to", run / "run.json", "--overwrite")
    assert line.endswith("is a file; give a folder")
    replay(run, to=tmp_path / "delta", form="delta")
    for to in (tmp_path / "delta", tmp_path, base):
        line = refused(
            "export",
            tmp_path / "delta",
            "--base",
            base,
            "--to",
            "merged",
            "--out",
            to,
            "--overwrite",
        )
        assert "which is read; give another folder" in line
    assert load_log(find_log(run)) and (base / MODEL).is_file() and not list(run.glob(".*"))


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_what_has_no_merged_form_is_replayed_as_an_adapter(runs, tmp_path) -> None:
    run = runs("prompt", f"method={METHODS['prompt']}", "export.merged=false")
    line = refused("replay", run, "--to", tmp_path / "merged")
    assert "merged: prompt_tuning cannot be merged into the weights of a model; use the" in line
    replay(run, to=tmp_path / "adapter", form="adapter")
    assert same(tmp_path / "adapter" / ADAPTER, run / "adapter" / ADAPTER)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def rewritten(log: Path, to: Path, **changes) -> Path:
    """Copy a log with another header or other gradients."""
    found = ZerothOrderLog.load(log)
    header = {**found.header, **{k: v for k, v in changes.items() if k != "gradients"}}
    tensors = {**found.tensors(), **{k: v for k, v in changes.items() if k == "gradients"}}
    to.mkdir()
    save_file(tensors, to / log.name, metadata={KEY: json.dumps(header)})
    return to


def test_a_log_that_leads_elsewhere_is_noticed(run_of, tmp_path) -> None:
    log = find_log(run_of("full"))
    gradients = ZerothOrderLog.load(log).tensors()["gradients"].clone()
    gradients[2] *= 1 + 2**-20
    changed = rewritten(log, tmp_path / "log", gradients=gradients)
    line = refused("replay", changed, "--to", tmp_path / "to")
    assert "log: leads to other weights than the run ended with" in line
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("mode", ["inplace", "reference"])
def test_modes_that_drift_are_refused(run_of, tmp_path, mode) -> None:
    log = rewritten(find_log(run_of("full")), tmp_path / "log", mode=mode)
    line = refused("replay", log, "--to", tmp_path / "to")
    assert f"was written with mode='{mode}', whose rounding drift is in no log; take" in line


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--until", "7"], "--until: got 7, allowed is 0 to 6, the updates of"),
        (["--until", "-1"], "--until: got -1, allowed is 0 to 6"),
        (["--format", "gguf"], "--format: got 'gguf'; expected one of merged, adapter, delta"),
        (["--format", "adapter"], "--format: got adapter; the run trained the model itself"),
        (["--device", "abacus"], "--device: got 'abacus': Expected one of cpu, cuda"),
        (["--device", "meta"], "--device: got 'meta': "),
        (["--base", "./nowhere"], "--base: ./nowhere: no such folder"),
        (["--dtype", "int8"], "--dtype: got 'int8'; expected one of auto"),
        (["--format", "delta", "--dtype", "float16"], "--dtype: is of merged weights"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(run_of, tmp_path, settings, says) -> None:
    assert says in refused("replay", run_of("full"), "--to", tmp_path / "to", *settings)
    assert not (tmp_path / "to").exists()


def test_what_is_missing_is_named(run_of, tmp_path) -> None:
    assert "no log.safetensors there" in refused("replay", tmp_path, "--to", tmp_path / "to")
    run = run_of("lora")
    assert "got delta; the run trained an adapter" in refused(
        "replay", run, "--to", tmp_path / "to", "--format", "delta"
    )
    shutil.copy(find_log(run), tmp_path / "log.safetensors")
    line = refused("replay", tmp_path / "log.safetensors", "--to", tmp_path / "to")
    assert "start: not there; a run that trained an adapter starts from it" in line
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "mine").touch()
    assert "is not empty" in refused("replay", run, "--to", tmp_path / "to")
    (tmp_path / "log.safetensors").write_bytes(find_log(run).read_bytes()[:-5])
    line = refused("replay", tmp_path / "log.safetensors", "--to", tmp_path / "new")
    assert "is damaged or not a zeroth-order log" in line


CONFIGS = {
    "plain": {},
    "queries": {"queries": 3},
    "masked": {"sparsity": 0.7},
    "random mask": {"sparsity": 0.7, "mask": "random"},
    "sign": {"update": "sign"},
    "momentum": {"update": "momentum", "dense_state": True},
    "adam": {"update": "adam", "dense_state": True, "queries": 2},
    "normals": {"noise": "gaussian_table"},
    "box-muller": {"noise": "gaussian"},
    "short log": {"log_dtype": "float16"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_every_rule_noise_and_mask_repeats_itself(llama, settings, dtype, tmp_path) -> None:
    model, twin = llama().to(dtype), llama().to(dtype)
    config = ZerothOrderConfig(**settings)
    trained = trained_set(list(model.named_parameters()), config, seed=3)
    decayed = [t.parameter for t in trained if t.parameter.ndim > 1]
    plain = [t.parameter for t in trained if t.parameter.ndim == 1]
    groups = [{"params": decayed, "lr": 0.0, "weight_decay": 0.1}, {"params": plain, "lr": 0.0}]
    optimizer = ZerothOrderOptimizer(groups, trained, config, 3)
    given = torch.randn(6, config.queries, generator=torch.Generator().manual_seed(0)).tolist()
    for number, gradients in enumerate(given):
        for group, rate in zip(optimizer.param_groups, (1e-2 / (number + 1), 3e-3), strict=True):
            group["lr"] = rate
        optimizer.propose(None if number == 2 else gradients)  # one update is skipped
        optimizer.step()
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    optimizer.log.save(tmp_path / "log.safetensors")
    replay_onto(twin, ZerothOrderLog.load(tmp_path / "log.safetensors"))
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(start[name], p) for name, p in twin.named_parameters())


@pytest.mark.parametrize("setting", [{"noise": "gaussian"}, {"update": "adam"}])
def test_what_differs_between_devices_is_replayed_on_one_kind(run_of, tmp_path, setting) -> None:
    log = rewritten(find_log(run_of("full")), tmp_path / "log", device="cuda", **setting)
    line = refused("replay", log, "--to", tmp_path / "to")
    assert "gives other bits on cpu than on cuda; pass --device cuda" in line


def test_a_hash_is_of_names_types_shapes_and_bits() -> None:
    zero = torch.zeros(2, 3)
    others = [
        ("b", zero),
        ("a", zero.half()),
        ("a", zero.view(3, 2)),
        ("a", -zero),
        ("a", zero.to(torch.bfloat16)),
    ]
    found = {weights_sha([pair]) for pair in [("a", zero), *others]}
    assert len(found) == 6
    assert weights_sha([("a", zero.t().contiguous().t())]) == weights_sha([("a", zero)])
