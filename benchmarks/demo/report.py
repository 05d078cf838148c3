"""Measures and tables of both parts of the demo."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lskip.evaluation.layers.settling import spellings
from lskip.evaluation.tasks.prompts import Prompt
from lskip.inference import Generation
from lskip.utils.console import plain_table

console = Console(width=110, markup=False, highlight=False)


def acceptance(runs: Sequence[Generation]) -> dict:
    """Over all runs together; the two figures belong together, since acceptance falls as more is drafted."""
    drafted = sum(run.drafted for run in runs)
    return {
        "acceptance_rate": sum(run.accepted for run in runs) / drafted if drafted else None,
        "tokens_per_round": sum(len(run.token_ids) for run in runs) / sum(run.rounds for run in runs),
    }


def speedup(seconds: list[float], runs: list[Generation]) -> float:
    """The median of the paired ratios: each run against what ran beside it."""
    return statistics.median(before / run.seconds for before, run in zip(seconds, runs, strict=True))


def distinct_3grams(texts: list[list[int]]) -> float:
    """Distinct 3-grams of tokens over all 3-grams, each text by itself: low where a model repeats itself."""
    shares = [len({*zip(t, t[1:], t[2:], strict=False)}) / (len(t) - 2) for t in texts if len(t) > 2]
    return statistics.mean(shares) if shares else 0.0


# Part 1.


def print_exits(exits: list[dict]) -> None:
    title = "Every exit: exact match if the text is made there, and agreement with the last layer along its texts"
    table = plain_table("layer", "held-out sentences", "held-out templates", "agreement", title=title)
    for row in exits:
        shares = (row["exact_match"], row["exact_match_templates"], row["agreement"])
        table.add_row(str(row["layer"]), *(f"{share:.3f}" for share in shares))
    console.print(table)


def print_parses(requests: Sequence[Prompt], texts: Sequence[Generation]) -> None:
    console.print("\nSome of them (each text is the last layer's own, token by token):")
    for request, text in zip(requests, texts, strict=True):
        answer = text.text.strip()
        wanted = "" if answer == request.example.reference else f"\n      wanted: {request.example.reference}"
        console.print(f"  {request.example.prompt.strip()}\n      {answer}{wanted}")


def print_rounds(request: Prompt, text: Generation, settled: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print a text token by token: what each round drafted, kept and corrected, and where each token settled."""
    title = f"Token by token: {request.example.prompt.strip()}"
    table = plain_table("round", "drafted", "accepted", "the model's own", "settled at layers", title=title, right=9)
    spelled = spellings(tokenizer, {token for each in text.history for token in (*each.drafted, *text.token_ids)})
    done = 0
    for number, each in enumerate(text.history):
        kept = each.accepted + (each.own is not None)
        drafted = " ".join(quoted(spelled[token]) for token in each.drafted)
        own = "" if each.own is None else quoted(spelled[each.own])
        corrected = " (corrects)" if each.accepted < len(each.drafted) and own else ""
        layers = " ".join(map(str, settled[done : done + kept]))
        table.add_row(str(number or "prompt"), drafted, str(each.accepted), own + corrected, layers)
        done += kept
    console.print(table)


def quoted(token: str) -> str:
    return f"‹{token}›"


# The summary.


def print_summary(summary: dict, output: Path) -> None:
    console.rule("Summary")
    print_task(summary["task"])
    print_smollm2(summary["smollm2"])
    console.print(f"{summary['seconds'] / 60:.1f} minutes; numbers: {output}/summary.json")


def print_task(task: dict) -> None:
    small, over = task["plain_small_model"], "speedup_over"
    early_exit = f"{task[f'{over}_assistant_early_exit']:.2f}x assistant_early_exit at its best"
    drafted, plain = task["tokens_per_second"], task["tokens_per_second_autoregressive"]
    console.print(
        f"LayerSkip, {size(task)}, trained in {task['fit_seconds']:.0f} s\n"
        f"  exact match {matches(task)}\n"
        f"  {drafting_of(task)}: {decoding(task)}\n"
        f"  {task['speedup']:.2f}x autoregressive (control {task['control']:.2f}x),"
        f" {task[f'{over}_generate']:.2f}x generate, {early_exit};\n"
        f"  {task['requests']} requests, prompts included, {drafted:.0f} tokens a second, {plain:.0f} without drafts\n"
        f"Plain, {size(small)}, trained in {small['fit_seconds']:.0f} s\n"
        f"  exact match {matches(small)}\n"
        f"  {small['tokens_per_second']:.0f} tokens a second, without drafts\n"
        f"{verdict(task)}"
    )


def size(model: dict) -> str:
    return f"{model['num_layers']} blocks, {model['parameters'] / 1e6:.1f}M parameters"


def matches(model: dict) -> str:
    sentences, templates = model["exact_match_sentences"], model["exact_match_templates"]
    return f"{sentences:.3f} on held-out sentences, {templates:.3f} on held-out templates"


def drafting_of(task: dict) -> str:
    if not task["num_speculations"]:
        return "lskip tune found no draft that pays here, so nothing is drafted"
    layers = "all its layers" if task["exit_layer"] is None else f"the first {task['exit_layer']} of its layers"
    layers = "n-grams" if task["draft"] == "ngram" else layers
    weights = f" in {task['draft_weights']}" if task["draft_weights"] else ""
    return f"{layers}{weights} draft {task['num_speculations']} (found by lskip tune)"


def verdict(task: dict) -> str:
    """What the small model wins, and what LayerSkip is then for: as the numbers have it."""
    small = task["plain_small_model"]
    faster = small["tokens_per_second"] / task["tokens_per_second"]
    gains = {kind: task[f"exact_match_{kind}"] - small[f"exact_match_{kind}"] for kind in ("sentences", "templates")}
    points = " and ".join(f"{100 * gain:+.1f} points on held-out {kind}" for kind, gain in gains.items())
    best = max(
        (row for row in task["exits"] if row["layer"] <= small["num_layers"]), key=lambda row: row["exact_match"]
    )
    speed = f"{faster:.2f}x the tokens a second" if faster >= 1 else f"only {faster:.2f}x the tokens a second"
    lines = [f"The small model makes {speed}; LayerSkip's exact match is {points} of it."]
    if faster >= 1 and max(gains.values()) <= 0:
        lines.append("For this task alone the small model wins.")
    elif faster >= 1 and min(gains.values()) <= 0:
        lines.append("So the small model is for speed; which one is better depends on what is asked.")
    elif faster >= 1:
        lines.append("So the small model is for speed alone, the deep one for quality.")
    elif max(gains.values()) <= 0:
        lines.append("So the small model is for quality, the deep one for speed.")
    else:
        lines.append("So the small model has no advantage here.")
    lines.append(
        f"What LayerSkip adds is one checkpoint that answers at many depths: its exit {best['layer']} alone has exact"
        f" match {best['exact_match']:.3f} on held-out sentences, its last layer {task['exact_match_sentences']:.3f}."
    )
    return "\n".join(lines)


def print_smollm2(real: dict) -> None:
    console.print(
        f"SmolLM2: perplexity {real['layers'][14]['perplexity']:.2g} at layer 15, "
        f"{real['layers'][-1]['perplexity']:.1f} at layer {len(real['layers'])}\n"
        f"  without drafts {equality(real['mismatches'])}, {real['autoregressive_over_generate']:.2f}x transformers "
        f"generate in float32, distinct 3-grams {real['distinct_3grams']:.2f}"
    )
    for name, draft in real["drafts"].items():
        console.print(
            f"  {name} drafts {draft['num_speculations']}: {decoding(draft)},\n"
            f"    {draft['speedup_over_autoregressive']:.2f}x autoregressive, {draft['speedup_over_generate']:.2f}x "
            "generate"
        )


def decoding(part: dict) -> str:
    rate = "" if part["acceptance_rate"] is None else f"acceptance_rate {part['acceptance_rate']:.2f}, "
    return f"{equality(part['mismatches'])}, {rate}tokens_per_round {part['tokens_per_round']:.2f}"


def equality(count: int) -> str:
    return "texts equal" if count == 0 else f"{count} TEXTS DIFFER"
