"""Decoding: lskip beside transformers and llama.cpp on the same weights, greedy, interleaved in one process.

    python -m benchmarks.decoding.run --model smollm2 --prompts lskip/prompts/chat.jsonl --out result
    python -m benchmarks.decoding.run --model runs/small --prompts prompts.jsonl --out result --batch_sizes 1,2,4,8,16

Writes decoding.json (a record for each method and setting), environment.json, costs.json and figures into --out. The
records are written after every prompt, so that a killed run keeps its measurements. benchmarks/README.md explains them.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.decoding.batches import batch_gains, batch_groups, batch_rates, batch_settings
from benchmarks.decoding.llama_cpp_peer import LlamaCpp, LlamaCppProcess
from benchmarks.decoding.lskip_methods import PromptPass
from benchmarks.decoding.measuring import Contestant, Measured, measure, records, references
from benchmarks.decoding.memory import peak_of
from benchmarks.decoding.options import Job, make_parser, prepare
from benchmarks.decoding.report import (
    batch_figure,
    print_differences,
    print_records,
    setting_of,
    speedup_figure,
)
from benchmarks.decoding.settings import Setting
from benchmarks.demo.report import distinct_3grams
from benchmarks.environment import environment
from lskip.inference.stopping import end_tokens
from lskip.utils.output_files import write_json

console = Console(width=190)


def main(arguments: list[str] | None = None) -> None:
    options = make_parser(__doc__).parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        job = prepare(options)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.decoding.run: {error}") from error
    with tempfile.TemporaryDirectory() as files:
        try:
            run(job, Path(files))
        finally:
            job.shared.close()


def run(job: Job, files: Path) -> None:
    """Run everything: one prompt at a time, batches, memory, and the report.

    Args:
        files: a folder for llama.cpp's model files.
    """
    start_llama_cpp(job, files)
    alone = measure_alone(job)
    reference = references(alone)
    write_environment(job, reference)
    found = records(alone, job.options.model, reference, job.options.dtype)
    if max(job.options.batch_sizes) > 1:
        found += measure_batches(job, found, reference)
    write(job, "decoding.json", found)
    if job.options.memory:
        measure_memory(job, found, files)
    print_records(found, console)
    print_differences(alone, reference, job.options.dtype, console)
    speedup_figure(found).savefig(job.options.out / "speedups.png", dpi=120)
    generators, costs = job.shared.generators.by_name(), job.shared.generators.costs
    write(job, "costs.json", {name: [each.to_dict() for each in costs[made]] for name, made in generators.items()})


def start_llama_cpp(job: Job, files: Path) -> None:
    """Start llama.cpp where it is asked for; where it cannot run, say why and drop its settings."""
    if not any(setting.method == "llama_cpp" for setting in job.settings):
        return
    reason = "it is not installed here; --llama_cpp_python names an interpreter that has it"
    if job.llama_cpp_python is not None:
        try:
            job.shared.start_llama_cpp(job.llama_cpp_python, files, job.context, job.options.out / "llama_cpp.log")
            return
        except (ValueError, RuntimeError) as error:
            reason = str(error)
    console.print(f"llama_cpp is left out: {reason}")
    job.settings = [setting for setting in job.settings if setting.method != "llama_cpp"]


def build(job: Job, settings: list[Setting]) -> list[Contestant]:
    """Return the contestants that work here, and print each reason why others do not once."""
    batches = sorted({setting.batch for setting in settings})
    contestants, reasons = [PromptPass(job.shared.generators, batch) for batch in batches], set()
    for setting in settings:
        try:
            contestants.append(job.shared.build(setting))
        except (ValueError, RuntimeError) as error:
            if str(error) not in reasons:
                console.print(f"{setting} is left out: {error}")
            reasons.add(str(error))
    return contestants


def measure_alone(job: Job) -> Measured:
    """Every setting, one prompt at a time."""

    def keep(measured: Measured) -> None:
        job.shared.generators.measure_costs([1])
        reference = references(measured)
        write(job, "decoding.json", records(measured, job.options.model, reference, job.options.dtype))

    groups = [[prompt] for prompt in job.prompts] * job.options.repeats
    return measure(build(job, job.settings), groups, job.options.max_new_tokens, keep)


def measure_batches(job: Job, alone: list[dict], reference: dict) -> list[dict]:
    """The records of all batches but 1, which `alone` has; prints what batches bring, and draws it."""
    options = job.options

    def keep(measured: Measured) -> list[dict]:
        found = records(measured, options.model, reference, options.dtype)
        more = [record for record in found if record["batch"] > 1]
        write(job, "decoding.json", alone + more)
        return more

    def after_group(measured: Measured) -> None:
        job.shared.generators.measure_costs(options.batch_sizes)
        keep(measured)

    contestants = build(job, batch_settings(alone, options.batch_sizes))
    groups = batch_groups(job.prompts, options.batch_sizes, options.repeats)
    measured = measure(contestants, groups, options.max_new_tokens, after_group)
    rates = batch_rates(measured)
    batch_figure(rates, options.model).savefig(options.out / "batches.png", dpi=120)
    for sentence in batch_gains(measured, rates):
        console.print(sentence)
    return keep(measured)


def measure_memory(job: Job, found: list[dict], files: Path) -> None:
    """Fill in peak_mib, record by record."""
    options = job.options
    by_length = sorted(job.prompts, key=len, reverse=True)
    for record in found:
        setting = setting_of(record)
        group = list(islice(cycle(by_length), setting.batch))
        if setting.method == "llama_cpp":
            record["peak_mib"] = llama_cpp_peak(job, files, setting, group)
        else:
            record["peak_mib"] = peak_of(setting, group, options)
        write(job, "decoding.json", found)


def llama_cpp_peak(job: Job, files: Path, setting: Setting, group: list[list[int]]) -> float:
    process = LlamaCppProcess(job.llama_cpp_python, job.options.out / "llama_cpp.log")
    try:
        contestant = LlamaCpp(process, files, setting, end_tokens(job.shared.model, None), job.context)
        contestant.run(group, job.options.max_new_tokens)
        return process.ask(do="memory")["mib"]
    finally:
        process.close()


def write_environment(job: Job, reference: dict) -> None:
    """environment.json; prints how far the reference text repeats itself."""
    distinct = distinct_3grams(list(reference.values()))
    content = environment(torch.device(job.options.device)) | {
        "options": vars(job.options),
        "prompts": len(job.prompts),
        "prompt_tokens": sum(map(len, job.prompts)),
        "distinct_3grams": distinct,
        "weights": {name: layout_of(made.runner) for name, made in job.shared.generators.by_name().items()},
        "llama_cpp": job.shared.llama_cpp.version if job.shared.llama_cpp else None,
    }
    write(job, "environment.json", content)
    console.print(", ".join(f"{name} {value}" for name, value in content.items() if name != "options"))


def layout_of(runner) -> str:
    """Return the layout of the model's weights: FusedRunner chooses one for this machine, ModuleRunner has none."""
    return getattr(runner, "layout", "plain")


def write(job: Job, name: str, content) -> None:
    write_json(job.options.out / name, content)


if __name__ == "__main__":
    main(sys.argv[1:])
