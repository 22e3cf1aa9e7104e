"""One job from recipe to exported model: load, measure, train, measure again, save, verify."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.data.encode import Encoded, encode
from sft.data.load import Examples, load_data
from sft.environment import check_kernels, versions
from sft.errors import UserError
from sft.evaluation.metrics import evaluate, held_out_batches
from sft.export.merged import export_merged, logits_of, merging_bound, verify_merged
from sft.export.quantized import export_quantized
from sft.models import load_model, load_tokenizer
from sft.processes import Team
from sft.quantization import is_quantized, write_record
from sft.recipe.arguments import build_arguments
from sft.recipe.load import to_yaml
from sft.recipe.schema import Recipe
from sft.recipe.zeroth_order import build_zeroth_order
from sft.run import folder as run_folder
from sft.run.phases import Phases
from sft.run.progress import ProgressReport
from sft.run.put_together import is_sharding, put_together
from sft.run.trainable import Trainable, build_method
from sft.whole import written_whole

VERIFIED_BATCHES = 2


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run achieved; written as run.json into its folder."""

    output_dir: Path
    before: dict[str, float]
    after: dict[str, float]
    trained_weights: int
    all_weights: int
    steps: int
    train_loss: float
    max_logit_difference: float | None  # reloaded merged folder against the model in memory
    seconds: dict[str, float]


def train_from_recipe(recipe: Recipe, console: Console | None = None) -> RunResult:
    """Run a resolved recipe (see `load_recipe`).

    Args:
        recipe: What to do.
        console: Where progress is printed, default: standard output.

    Raises:
        UserError: When the recipe, its files and its model do not fit together.
    """
    team = Team(cpu=bool(recipe.training.get("use_cpu")))
    console = (console or Console()) if team.first else Console(quiet=True)
    phases = Phases(console)
    check_kernels()
    _seed_everything(recipe.seed)
    resume = recipe.training.get("resume_from_checkpoint")
    output = Path(recipe.training["output_dir"])
    checkpoint = run_folder.check(output, resume=resume, overwrite=recipe.overwrite)
    method = build_method(recipe.method)
    with team.first_on_each_machine_first():
        data, tokenizer, model = _load(recipe, method, phases)
    with phases.phase("method"):
        model = _attached(recipe, method, model)
        trained, total = method.counts(model)
        report = ProgressReport(console, prefix=f"{recipe.method['name']}_")
        try:
            trainer = _build_trainer(recipe, model, tokenizer, data, report)
        except ValueError as error:
            raise UserError(f"training: {error}") from error
        # everything fits: from here on the folder is this run's
        team.wait()  # for all to have looked into it
        if team.first:
            run_folder.clear(output, keep_checkpoints=checkpoint is not None)
            (output / run_folder.RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
        phases.note(_trains(recipe, trained, total))
        if not (method.saved or recipe.export.merged):
            console.print("export.merged is false: the weights stay in checkpoints and logs alone")
    held_out = _encode(recipe, data, tokenizer)
    with method.untrained(model):
        before = _measure("before", recipe, model, tokenizer, held_out, phases)
    with phases.phase("train"):
        outcome = _train(trainer, checkpoint)
        phases.note(f"{outcome.global_step} steps, mean loss {outcome.training_loss:.3f}")
    result = RunResult(
        output, before, {}, trained, total, outcome.global_step, outcome.training_loss, None,
        phases.seconds,
    )  # fmt: skip
    model = _trained(recipe, method, trainer, model, team)
    if model is not None:  # where it was put together, the first process has the last word
        given = (recipe, method, trainer, model, tokenizer, data, held_out, team, phases)
        result = _concluded(result, *given)
    team.leave()
    return result


def _concluded(
    result: RunResult,
    recipe: Recipe,
    method: Trainable,
    trainer: Any,
    model: Any,
    tokenizer: Any,
    data: Examples,
    held_out: list[Encoded],
    team: Team,
    phases: Phases,
) -> RunResult:
    """Save, measure and export the trained model; the first process alone writes."""
    output, difference = result.output_dir, None
    if method.saved and team.first:
        _save_adapter(recipe, model, tokenizer, output / run_folder.ADAPTER, phases)
    if trainer.offloaded_base is not None and recipe.export.merged:
        trainer.offloaded_base.close()  # merging writes to the weights
        model.to("cpu")
    with method.trained(model):
        after = _measure("after", recipe, model, tokenizer, held_out, phases, result.before)
        batches = _batches(recipe, data, tokenizer, held_out, model.device)
        expected = logits_of(model, batches) if recipe.export.merged else []
    if team.first:
        difference = _export(recipe, model, tokenizer, output, batches, expected, phases)
    result = dataclasses.replace(result, after=after, max_logit_difference=difference)
    if team.first:
        notes = {"versions": versions(), "recipe": recipe.model_dump()}
        run_folder.write_record(output, dataclasses.asdict(result) | notes)
    return result


def _trained(recipe: Recipe, method: Trainable, trainer: Any, model: Any, team: Team) -> Any:
    """Return the trained model as it is measured and exported, or None where another has it."""
    if is_sharding(trainer):
        return put_together(trainer, recipe.model, adapter=method.saved, first=team.first)
    # autocast stays on the trained model's forward
    return trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def _seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; ask cuDNN for repeatable kernels, which costs little."""
    import torch
    from transformers import set_seed

    set_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _load(recipe: Recipe, method: Trainable, phases: Phases) -> tuple[Examples, Any, Any]:
    """Load data first: its mistakes are the commonest and the quickest to find."""
    with phases.phase("data"):
        data = load_data(recipe.data, recipe.seed)
        held_out = 0 if data.held_out is None else len(data.held_out)
        phases.note(f"{len(data.train):,} examples to train on, {held_out:,} held out")
    with phases.phase("model"):
        tokenizer = load_tokenizer(recipe.model)
        if method.from_scratch:
            phases.note(f"{recipe.model.name}'s architecture, random weights")
            return data, tokenizer, None
        device = "cpu" if recipe.training.get("use_cpu") else None
        model = load_model(recipe.model, device=device)
        packed = recipe.model.quantization
        shown = model.dtype if packed is None else f"{packed.bits} and {model.dtype}"
        phases.note(f"{recipe.model.name}, {model.num_parameters():,} weights, {shown}")
    return data, tokenizer, model


def _encode(recipe: Recipe, data: Examples, tokenizer: Any) -> list[Encoded]:
    """Encode the held-out examples that are measured."""
    if data.held_out is None:
        return []
    count = min(recipe.evaluation.num_examples or len(data.held_out), len(data.held_out))
    return _encoded(recipe, data, tokenizer, data.held_out.select(range(count)))


def _encoded(recipe: Recipe, data: Examples, tokenizer: Any, rows: Any) -> list[Encoded]:
    """Encode rows at the length that training uses."""
    longest = recipe.training.get("max_length", 1024) or 10**9
    return [encode(row, data.format, tokenizer, longest) for row in rows]


def _measure(
    name: str,
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    held_out: list[Encoded],
    phases: Phases,
    before: dict[str, float] | None = None,
) -> dict[str, float]:
    """Evaluate the held-out examples, and print the figures."""
    spec = recipe.evaluation
    if not held_out or not spec.metrics:
        return {}
    with phases.phase(name):
        found = evaluate(
            model, tokenizer, held_out, spec.metrics,
            max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size,
        )  # fmt: skip
        change = {key: f" (was {value:.4f})" for key, value in (before or {}).items()}
        shown = ", ".join(f"{k} {value:.4f}{change.get(k, '')}" for k, value in found.items())
        phases.note(f"{shown} on {len(held_out)} held-out examples")
    return found


def _attached(recipe: Recipe, method: Trainable, model: Any) -> Any:
    """Ready the model for its method; two that do not fit are refused."""
    try:
        return method.attach(model, recipe.model)
    except ValueError as error:
        raise UserError(f"method: does not fit {recipe.model.name}: {error}") from error


def _trains(recipe: Recipe, trained: int, total: int) -> str:
    """Say what is trained, and by which way to a gradient."""
    text = f"{recipe.method['name']} trains {trained:,} of {total:,} weights"
    text += f" ({100 * trained / total:.3f} %)"
    if recipe.zeroth_order is None:
        return text
    sparsity = recipe.zeroth_order["sparsity"]
    masked = f", {100 * (1 - sparsity):g} % of each tensor" if sparsity else ""
    return f"{text} by forward passes{masked}"


def _build_trainer(
    recipe: Recipe, model: Any, tokenizer: Any, data: Examples, report: ProgressReport
) -> Any:
    """Hand everything to the trainer."""
    import datasets
    from transformers import PrinterCallback

    from sft.mark_checkpoints import MarkCheckpoints
    from sft.offload.config import OffloadConfig
    from sft.trainers.supervised import SparseSFTTrainer

    arguments = build_arguments(recipe.training, recipe.seed, runs=True)
    config = build_zeroth_order(recipe.zeroth_order)
    datasets.disable_progress_bars()
    trainer = SparseSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out if arguments.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=[report] if config is not None else [report, MarkCheckpoints()],
        zeroth_order=config,
        offload=None if recipe.offload is None else OffloadConfig(**recipe.offload.model_dump()),
    )
    trainer.remove_callback(PrinterCallback)
    if config is not None:
        trainer.zeroth_order_log.base = (recipe.model.name, recipe.model.revision)
    trainer.sparse_callback.notes = {"recipe": recipe.model_dump(mode="json")}
    return trainer


def _train(trainer: Any, checkpoint: str | None) -> Any:
    """Train, and leave the terminal tidy whatever happens."""
    reports = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressReport)]
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        where = f"training.resume_from_checkpoint: {checkpoint}: " if checkpoint else ""
        raise UserError(f"{where}{error}") from error
    finally:
        for report in reports:
            report.close()


def _save_adapter(recipe: Recipe, model: Any, tokenizer: Any, folder: Path, phases: Phases) -> None:
    """Write the adapter, with the tokenizer it was trained with."""
    with phases.phase("save"), written_whole(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_record(temporary, recipe.model)
        phases.note(f"adapter in {folder}")


def _batches(
    recipe: Recipe, data: Examples, tokenizer: Any, held_out: list[Encoded], device: Any
) -> Any:
    """Return inputs for the comparison of logits: held-out ones, or else training ones."""
    size = recipe.evaluation.batch_size
    rows = data.train.select(range(min(size * VERIFIED_BATCHES, len(data.train))))
    examples = held_out or _encoded(recipe, data, tokenizer, rows)
    return held_out_batches(examples, size, tokenizer.pad_token_id, device, VERIFIED_BATCHES)


def _export(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    output: Path,
    batches: Any,
    expected: Any,
    phases: Phases,
) -> float | None:
    """Write the merged folder and prove that it is the trained model."""
    if not recipe.export.merged:
        return None
    folder = output / run_folder.MERGED
    if is_quantized(model):
        return _export_quantized(recipe, model, tokenizer, folder, batches, phases)
    bound = merging_bound(model, expected)
    found: list[float] = []

    def check(written: Path) -> None:
        found.append(verify_merged(written, batches, expected, bound=bound))

    with phases.phase("export"):
        export_merged(model, tokenizer, folder, check=check if recipe.export.verify else None)
        proof = f"; reloaded: max |logit difference| {found[0]:g}" if found else ""
        phases.note(f"merged model in {folder}{proof}")
    return found[0] if found else None


def _export_quantized(
    recipe: Recipe, model: Any, tokenizer: Any, folder: Path, batches: Any, phases: Phases
) -> float | None:
    """Merge over a packed base in the way asked for, and say what that changed."""
    plain = recipe.model.model_copy(update={"quantization": None})
    with phases.phase("export"):
        difference, error = export_quantized(
            model, tokenizer, folder, recipe.export.quantized, batches,
            verify=recipe.export.verify, reference=lambda: load_model(plain),
        )  # fmt: skip
        proof = "" if difference is None else f"; reloaded: max |logit difference| {difference:g}"
        phases.note(f"merged model in {folder}{proof}")
    for line in error.lines():
        phases.console.print(line, highlight=False, soft_wrap=True, markup=False)
    return difference
