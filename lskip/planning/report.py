"""The printed table of a plan, and its JSON."""

from __future__ import annotations

from rich.console import Console

from lskip.planning.memory import DDP, FSDP2, GLIBC_GAPS, PARTS
from lskip.planning.plan import Plan
from lskip.utils.console import plain_table


def print_plan(plan: Plan, mfu: float, peak: float | None, console: Console) -> None:
    """Print memory by part, FLOPs by part, and steps, tokens and hours.

    Args:
        mfu: share of the peak that training is taken to reach.
        peak: FLOPs a second of one device; None: not known, and so no hours.
    """
    choices = {plan.checkpointing: plan.memory, not plan.checkpointing: plan.other_memory}
    table = plain_table("part", "without checkpointing", "with", title="GB on each device, at its peak", right=1)
    for part, name in PARTS.items():
        sizes = [choices[choice].get(part, 0) for choice in (False, True)]
        if any(sizes):
            table.add_row(name, *(f"{size / 1e9:.2f}" for size in sizes))
    table.add_row("together", *(f"{sum(choices[choice].values()) / 1e9:.2f}" for choice in (False, True)))
    console.print(table)
    for line in sentences(plan, mfu, peak):
        console.print(line, highlight=False, soft_wrap=True)


def sentences(plan: Plan, mfu: float, peak: float | None) -> list[str]:
    """Return what is said below the table."""
    shape, average = plan.shape, plan.average
    kind = "GPU" if shape.on_gpu else "CPU"
    where = f"{shape.devices} {kind}s" if shape.devices > 1 else f"one {kind}"
    how = {DDP: ", DDP", FSDP2: ", FSDP2"}.get(shape.strategy, "")
    total_memory = sum(plan.memory.values()) / 1e9
    beside = (
        "besides its libraries and gaps"
        if shape.on_gpu
        else f"some {total_memory * GLIBC_GAPS:.1f} with the gaps of glibc's malloc (docs/memory.md)"
    )
    exits = sum(average.exits_on)
    flops = plan.flops_per_token
    parts = ", ".join(f"{name} {count / 1e9:.3g}" for name, count in flops.items() if count)
    total = sum(flops.values())
    lines = [
        f"on {where}{how}, {shape.precision}, gradient_checkpointing {str(plan.checkpointing).lower()}: "
        f"{total_memory:.1f} GB on each, {beside}",
        f"weights: {plan.parameters:,}, of which {plan.trained:,} train",
        f"layer dropout: {sum(average.drop_rates) / len(average.drop_rates):.1%} of the blocks' rows on average; "
        f"exits: {exits:.2f} on at a mean step, {sum(each > 0 for each in average.largest_exit_weights)} at most",
        f"GFLOPs a token, forward and backward: {parts}; together {total / 1e9:.3g}, "
        f"{total / plan.full_flops_per_token:.0%} of full depth with the last exit alone",
        _run(plan),
        _time(plan, mfu, peak),
    ]
    if plan.states_estimated:
        lines.append("optimizer states: measured on a small matrix, since this optimizer does not run without memory")
    return lines


def _run(plan: Plan) -> str:
    shape = plan.shape
    batch = f"{shape.tokens_per_step:,} tokens a step, where all rows are full"
    if shape.steps is None:
        return f"run: {batch}; how many there are is not known before the data are read: set trainer.max_steps"
    return f"run: {shape.steps:,} steps, {shape.steps * shape.tokens_per_step:,} tokens ({batch})"


def _time(plan: Plan, mfu: float, peak: float | None) -> str:
    if peak is None:
        return "time: not known; --peak_flops gives the peak of one device in TFLOP/s (989 for an H100 in bfloat16)"
    hours = plan.hours(mfu, peak)
    at = f"if training reaches an MFU of {mfu:g} at {peak / 1e12:g} TFLOP/s a device, without validation and saving"
    if plan.shape.steps is None:
        return f"time: {3600 * hours:.3g} s a step {at}"
    return f"time: {hours:.3g} hours {at}"


def record_of(plan: Plan, mfu: float, peak: float | None) -> dict:
    """Return what --output holds."""
    hours = None if peak is None else plan.hours(mfu, peak)
    known = plan.shape.steps is not None
    return {
        **plan.record(),
        "mfu": mfu,
        "peak_flops": peak,
        "hours": hours if known else None,
        "seconds_a_step": None if hours is None else 3600 * hours / (plan.shape.steps or 1),
    }
