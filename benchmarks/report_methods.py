"""The section on a training step of every method and peer of docs/benchmarks.md."""

from __future__ import annotations

from method_results import CLOSE, LABELS, MAIN, MIB, PARTS, PEERS, Cell, Found, machine


def section(cells: dict[str, Cell]) -> str:
    """Describe `benchmarks/methods.py`."""
    main = cells[MAIN]
    parts = [_introduction(main), _main_table(main)]
    if CLOSE in cells:
        parts.append(_close(cells[CLOSE]))
    parts += [_figures(), _sweep(cells)]
    if f"{MAIN}-more" in cells:
        parts.append(_more(cells[f"{MAIN}-more"]))
    return "\n".join(parts)


def _introduction(main: Cell) -> str:
    config = next(iter(main.values())).record["run_info"]["train_config"]
    rounds = {len(found.totals()) for found in main.values()}
    shown = "-".join(str(n) for n in sorted({min(rounds), max(rounds)}))
    return (
        "## One training step: methods and peers\n\n"
        f"`python benchmarks/methods.py`: {config['model_id']}, {config['dtype']}, batch "
        f"{config['batch_size']} x {config['max_seq_length']} tokens, {shown} rounds, "
        f"{machine(main['floor'])}. All linear layers but the head, unless said; the first group "
        "of ours trains as many weights as LoRA of rank 16. Step is the median of the ratios to "
        "the floor's CPU time in the same round, in brackets the least and the largest; the parts "
        "are CPU seconds. Kept is what autograd keeps for backward; state is the optimizer's, with "
        "the gradients; beside are indices, views of patterns and originals to put back. Peak is "
        "the most memory of a process of its own over one that has only loaded the model.\n"
    )


def _main_table(cell: Cell) -> str:
    rows = [
        "| | trained | step | forward | backward | optimizer | kept | state | beside | peak | "
        "file | per weight |",
        "|---" * 12 + "|",
    ]
    for name, found in cell.items():
        rows.append(f"| {LABELS[name]} | " + " | ".join(_cells(found, cell["floor"])) + " |")
    return "\n".join([*rows, ""])


def _close(cell: Cell) -> str:
    """Few cases over many rounds: what a few rounds of many cannot tell apart."""
    shown = [f"{LABELS[name]} {spread(found, cell['floor'])}" for name, found in cell.items()]
    rounds = len(cell["floor"].totals())
    return f"The same step over {rounds} rounds of {len(cell)} cases: {'; '.join(shown[1:])}.\n"


def _cells(found: Found, floor: Found) -> list[str]:
    held = found.bytes
    peak = held.get("peak_rss_over_base")
    size, trained = found.file_size, found.trained
    return [
        f"{trained:,}" if trained else "",
        spread(found, floor),
        *(f"{found.seconds(part):.2f}" for part in PARTS[:3]),
        _mib(found.saved),
        _mib(held["optimizer"] + held["gradients"]),
        _mib(held["indices"] + held["originals"]),
        "" if peak is None else _mib(peak),
        _mib(size) if size else "",
        f"{size / trained:.1f} B" if size and trained else "",
    ]


def spread(found: Found, floor: Found) -> str:
    """Return a ratio to the floor with its spread."""
    middle, least, largest = found.ratio(floor)
    return f"{middle:.2f} ({least:.2f}-{largest:.2f})"


def _mib(count: int) -> str:
    return f"{count / MIB:.0f} MiB" if count >= 10 * MIB or not count else f"{count / MIB:.1f} MiB"


def _figures() -> str:
    return (
        "![CPU seconds of a step by part](figures/step.png)\n\n"
        "![Bytes of a step by kind](figures/bytes.png)\n\n"
        "![Step time over the floor by tokens](figures/sweep.png)\n"
    )


def _sweep(cells: dict[str, Cell]) -> str:
    shown = {name: cell for name, cell in cells.items() if name.count("-") == 1}
    cases = [case for case in LABELS if any(case in cell for cell in shown.values())]
    rows = [
        "Other sizes and dtypes: step over the floor's, and MiB kept for backward.\n",
        "| | " + " | ".join(_size(name) for name in shown) + " |",
        "|---" * (1 + len(shown)) + "|",
    ]
    for case in cases:
        columns = []
        for cell in shown.values():
            found = cell.get(case)
            if found is None:
                columns.append("")
            else:
                ratio = found.ratio(cell["floor"])[0]
                columns.append(f"{ratio:.2f}, {found.saved / MIB:.0f}")
        rows.append(f"| {LABELS[case]} | " + " | ".join(columns) + " |")
    return "\n".join([*rows, ""])


def _size(name: str) -> str:
    dtype, _, size = name.partition("-")
    return f"{dtype} {size.replace('x', ' x ')}"


def _more(cell: Cell) -> str:
    floor = cell["floor"]
    rows = [
        "What selection costs, and other states of the methods. Selection is what a window reads, "
        "ranks and moves, counted apart from backward.\n",
        "| | step | forward | backward | optimizer | selection | kept |",
        "|---" * 7 + "|",
    ]
    for name, found in cell.items():
        parts = " | ".join(f"{found.seconds(part):.3f}" for part in PARTS)
        row = f"| {LABELS[name]} | {spread(found, floor)} | {parts} | {_mib(found.saved)} |"
        rows.append(row)
    mean = selection_per_update(cell)
    total = sum(floor.seconds(part) for part in PARTS)
    rows.append(
        f"\nOver a cycle of 20 updates with a window of 5, selection takes {1000 * mean:.0f} ms of "
        f"CPU time an update, {mean / total:.1%} of the floor.\n"
    )
    return "\n".join(rows)


def selection_per_update(cell: Cell) -> float:
    """Return the mean CPU seconds of selection: S = 20, A = 5, one reselection a cycle."""
    inside, ends = (cell[n].seconds("selection") for n in ("spiel_window", "spiel_reselect"))
    return (4 * inside + ends) / 20


def summary_rows(main: Cell, close: Cell) -> list[str]:
    """Return the README's rows: step over the floor's and LoRA's, and bytes kept.

    Args:
        main: has every case.
        close: steps of these are from more rounds.
    """
    order = ("s2ft_sparse", "spiel_sparse", "s2ft", "spiel", "sora", "sltrain", *PEERS)
    rows = []
    for case in order:
        if case in main:
            found, cell = main[case], close if case in close else main
            floor, lora = (cell[case].ratio(cell[to])[0] for to in ("floor", "lora"))
            label = f"{LABELS[case]} | {found.trained:,} | {floor:.2f} | {lora:.2f}"
            rows.append(f"| {label} | {found.saved / MIB:.0f} MiB |")
    return rows
