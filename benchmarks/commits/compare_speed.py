"""Decode with two checkouts turn by turn, and print how fast the second is against the first.

    python benchmarks/commits/compare_speed.py --before CHECKOUT --after CHECKOUT --out speed.json

A process of `before`, one of `after` and a second one of `before` as `control` decode the same prompts in turns, in an
order that changes; an idle one waits. A ratio is the median over the turns of after's tokens a second over before's,
with what the middle half of the turns lies between. What is no further from 1 than the control's says nothing.
Threads are torch's default, as a user has them, unless --threads says otherwise; a busy machine makes figures
worthless.

The models are made once by `before`, in --work: an export in bfloat16, and a run of three steps from there, exported in
float32, whose numbers fit no 16 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

WORKER = Path(__file__).with_name("compare_speed_worker.py")


class Case(NamedTuple):
    """Say what is decoded: by which of the models, how it is loaded, how many texts together, and with which drafts."""

    name: str
    model: str
    loading: dict[str, Any]
    batch: int
    settings: dict[str, Any]


def cases(exit_layer: int) -> list[Case]:
    """Return the cases that are compared, those of one load together."""
    int8 = {"draft_weights": "int8"}
    return [
        Case("autoregressive", "packaged", {}, 1, {}),
        Case("int4 drafts of 16", "packaged", {"draft_weights": "int4"}, 1, {"num_speculations": 16}),
        Case("batch 8", "packaged", {"batch_size": 8}, 8, {}),
        Case("bfloat16 export", "export", {"dtype": "bfloat16"}, 1, {}),
        Case("bfloat16 export in float32", "export", {}, 1, {}),
        Case("tuned", "tuned", {}, 1, {}),
        Case("tuned, int8 drafts", "tuned", int8, 1, {"num_speculations": 8}),
        Case("tuned, int8 drafts of the exit", "tuned", int8, 1, {"num_speculations": 4, "exit_layer": exit_layer}),
    ]


class Worker:
    """Decode with a checkout, in a process of its own."""

    def __init__(self, checkout: Path, threads: int | None):
        command = [sys.executable, str(WORKER), *([] if threads is None else [str(threads)])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=checkout, env=environment(checkout), text=True, **pipes)

    def ask(self, **order) -> dict:
        """Return its answer to an order."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended at {order}")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def environment(checkout: Path) -> dict[str, str]:
    """Return one with the checkout's lskip, and the number of threads that torch takes by itself."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**kept, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}


def make_models(before: Path, work: Path, model: str) -> None:
    """Make the bfloat16 export, and three steps of training from there."""
    work.mkdir(parents=True, exist_ok=True)

    def lskip(*arguments: str) -> None:
        command = [sys.executable, "-m", "lskip", *arguments]
        subprocess.run(command, cwd=work, env=environment(before), check=True, stdout=subprocess.DEVNULL)

    if not (work / "export").exists():
        lskip("export", f"--model={model}", "--output=export", "--dtype=bfloat16")
    if not (work / "tuned").exists():
        texts = [f"{number} and {number + 1} make {2 * number + 1}, as everybody knows." * 4 for number in range(200)]
        (work / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        fit = ["fit", "--model=export", "--run_folder=run", "--data.source=data.jsonl", "--data.cache_dir=cache"]
        fit += ["--data.block_size=32", "--data.batch_size=1", "--data.max_val_blocks=1", "--trainer.max_steps=3"]
        lskip(*fit, "--optimizer=torch.optim.AdamW", "--optimizer.lr=1e-5", "--lr_scheduler=null")
        lskip("export", "--model=run", "--output=tuned", "--dtype=float32")


class Comparison:
    """Ask three workers in turns, and keep what that brings."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.checkouts = {"before": options.before, "after": options.after, "control": options.before}
        work, model = options.work.resolve(), options.model
        self.models = {"packaged": model, "export": str(work / "export"), "tuned": str(work / "tuned")}
        lines = (options.before / "lskip" / "prompts" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
        self.prompts = [json.loads(line)["prompt"] for line in lines]
        self.order = random.Random(0)

    def turns(self) -> list[str]:
        """Return the workers' names, in another order each time."""
        return self.order.sample(list(self.checkouts), len(self.checkouts))

    def run(self, chosen: list[Case]) -> list[dict]:
        """Return a record for each case."""
        workers = {name: Worker(place, self.options.threads) for name, place in self.checkouts.items()}
        records, loaded = [], None
        try:
            for case in chosen:
                if loaded != (case.model, case.loading):
                    for name in self.turns():  # one at a time: some commits time products while they load
                        workers[name].ask(load={"model": self.models[case.model], "device": "cpu", **case.loading})
                    loaded = (case.model, case.loading)
                records.append(self.measure(case, workers))
                print(in_words(records[-1]), flush=True)
        finally:
            for worker in workers.values():
                worker.end()
        return records

    def measure(self, case: Case, workers: dict[str, Worker]) -> dict:
        """Take all turns of a case; the first, to warm up, does not count."""
        tokens = self.options.tokens
        settings = {"temperature": 0.0, "max_new_tokens": tokens, "min_new_tokens": tokens, **case.settings}
        speeds, accepted, equal = {name: [] for name in workers}, dict.fromkeys(workers, 0), 0
        for turn in range(self.options.repeats + 1):
            start = turn * case.batch
            prompts = [self.prompts[(start + each) % len(self.prompts)] for each in range(case.batch)]
            found = {}
            for name in self.turns():
                found[name] = workers[name].ask(prompts=prompts, batch=case.batch, settings=settings)
            if turn:
                for name, each in found.items():
                    speeds[name].append(case.batch * tokens / each["seconds"])
                    accepted[name] += each["accepted"]
                equal += found["before"]["texts"] == found["after"]["texts"]
        return {
            "case": case.name,
            **ratios(speeds),
            "turns": self.options.repeats,
            "equal_texts": equal,
            "accepted": accepted,
        }

    def load_times(self) -> dict:
        """Return the seconds of load_generator in fresh processes, in turns; a ratio above 1 is slower here."""
        speeds = {name: [] for name in self.checkouts}
        for turn in range(self.options.repeats + 1):
            for name in self.turns():
                worker = Worker(self.checkouts[name], self.options.threads)
                answer = worker.ask(load={"model": self.options.model, "device": "cpu"})
                worker.end()
                if turn:
                    speeds[name].append(answer["seconds"])
        return {"case": "seconds to load", **ratios(speeds), "turns": self.options.repeats}


def ratios(measured: dict[str, list[float]]) -> dict:
    """Return medians, and the median paired ratios over `before` with their quartiles."""
    found = {"median": {name: statistics.median(values) for name, values in measured.items()}}
    for name in ("after", "control"):
        pairs = [ours / base for ours, base in zip(measured[name], measured["before"], strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
        found[name] = {"ratio": statistics.median(pairs), "middle_half": [low, high]}
    return found


def in_words(record: dict) -> str:
    """Return a line that says what was measured."""
    parts = [f"{record['case']:32}"]
    for name in ("after", "control"):
        low, high = record[name]["middle_half"]
        parts.append(f"{name} {record[name]['ratio']:.3f} ({low:.3f} to {high:.3f})")
    medians = ", ".join(f"{name} {value:.2f}" for name, value in record["median"].items())
    same = f"  equal texts {record['equal_texts']}/{record['turns']}" if "equal_texts" in record else ""
    return f"{parts[0]} {'  '.join(parts[1:])}  [{medians}]{same}"


def conditions(options: argparse.Namespace) -> dict:
    """Return where and with what it was measured."""
    import torch

    commits = {}
    for name in ("before", "after"):
        said = ["git", "-C", str(getattr(options, name)), "rev-parse", "HEAD"]
        commits[name] = subprocess.run(said, capture_output=True, text=True, check=False).stdout.strip()
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        **commits,
        "date": time.strftime("%Y-%m-%d"),
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": options.tokens,
        "repeats": options.repeats,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout; it also makes the models")
    parser.add_argument("--after", type=Path, required=True, help="the checkout to compare with it")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("runs/before_after"), help="folder of the models")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--exit_layer", type=int, default=8, help="of the drafts of an exit")
    parser.add_argument("--tokens", type=int, default=32, help="of each text")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its default if not given")
    parser.add_argument("--only", nargs="+", default=None, help="names of cases ('load': seconds to load)")
    options = parser.parse_args(arguments)
    options.before, options.after = options.before.resolve(), options.after.resolve()
    chosen = [case for case in cases(options.exit_layer) if options.only is None or case.name in options.only]
    if any(case.model != "packaged" for case in chosen):
        make_models(options.before, options.work, options.model)
    comparison = Comparison(options)
    records = comparison.run(chosen) if chosen else []
    if options.only is None or "load" in options.only:
        records.append(comparison.load_times())
        print(in_words(records[-1]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**conditions(options), "records": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
