"""Measures and tables of both parts of the demo."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console

from lskip.evaluation.layers.figure import perplexity_figure, print_layers
from lskip.inference import Generation
from lskip.models.readout import LayerReport

console = Console(width=100)


def show(reports: dict[str, LayerReport], figure: Path) -> None:
    for name, report in reports.items():
        print_layers(report, console, name)
    perplexity_figure(reports).savefig(figure, dpi=120)


def acceptance(runs: list[Generation]) -> dict:
    """Over all runs together; the two figures belong together, since acceptance falls as more is drafted."""
    return {
        "acceptance_rate": sum(run.accepted for run in runs) / sum(run.drafted for run in runs),
        "tokens_per_round": sum(len(run.token_ids) for run in runs) / sum(run.rounds for run in runs),
    }


def speedup(seconds: list[float], runs: list[Generation]) -> float:
    """The median of the paired ratios: each run against what ran beside it."""
    return statistics.median(before / run.seconds for before, run in zip(seconds, runs, strict=True))


def distinct_3grams(texts: list[list[int]]) -> float:
    """Distinct 3-grams of tokens over all 3-grams, each text by itself: low where a model repeats itself."""
    shares = [len({*zip(t, t[1:], t[2:], strict=False)}) / (len(t) - 2) for t in texts if len(t) > 2]
    return statistics.mean(shares) if shares else 0.0


def print_summary(summary: dict, output: Path) -> None:
    console.rule("Summary")
    small, real = summary["scratch"], summary["smollm2"]
    last = small["layers"][-1]["perplexity"]
    print_layers(report_of(real), console, "SmolLM2-135M-Instruct")
    print_layers(report_of(small), console, "trained from scratch")
    console.print(
        f"from scratch: perplexity {last:.0f} at the last layer (unigram {small['unigram_perplexity']:.0f}), "
        f"trained in {small['fit_seconds']:.0f} s\n"
        f"  the first {small['exit_layer']} layers draft {small['num_speculations']}: "
        f"{decoding(small)}, {small['speedup']:.2f}x autoregressive,\n"
        f"  distinct 3-grams {small['distinct_3grams']:.2f}\n"
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
    console.print(f"figures: {output}/scratch_layers.png, {output}/smollm2_layers.png; numbers: {output}/summary.json")


def report_of(part: dict) -> LayerReport:
    rows = part["layers"]
    return LayerReport([r["perplexity"] for r in rows], [r["agreement"] for r in rows], part["layers_needed"])


def decoding(part: dict) -> str:
    agreement = f"draft_agreement {part['draft_agreement']:.2f}, " if "draft_agreement" in part else ""
    return (
        f"{equality(part['mismatches'])}, {agreement}acceptance_rate {part['acceptance_rate']:.2f}, "
        f"tokens_per_round {part['tokens_per_round']:.2f}"
    )


def equality(count: int) -> str:
    return "texts equal" if count == 0 else f"{count} TEXTS DIFFER"
