"""The claims of the LayerSkip paper, tested on a model small enough to train many times: one table per question.

    python -m benchmarks.claims.run --out runs/claims [--questions h,i] [--quick] [--workers 2] [--publish PAGE]

Every arm and seed has a folder under OUT/runs and is done when its result.json exists: repeating the command runs what
is missing, stopped runs from their last checkpoint. Writes OUT/claims.md and figures beside it; --publish copies them
into a page, in place of everything below its line `<!-- results -->`. Questions h and i are reported over the seeds
that are finished in all of their arms: --report_only does that while others are still missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.claims.arms import (
    BOTH,
    CURRICULA,
    E_SCALE,
    NEITHER,
    QUICK,
    Sizes,
    make_arms,
    make_curriculum,
    make_recipes,
    make_targets,
)
from benchmarks.claims.report import make_sections, report
from benchmarks.claims.results import LONG, STEP_TIMES, Results, run_folder
from benchmarks.claims.tasks import measure_tasks
from benchmarks.claims.training import make_data, train
from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.training.timed_training import Kind, Trained
from benchmarks.training.timed_training import Sizes as TimedSizes
from benchmarks.training.train_step import paired_ratio, time_rounds
from lskip.callbacks import EarlyExitLoss
from lskip.utils.output_files import write_json

MARK = "<!-- results -->"
PAPER, QUESTIONS = "abcdefg", "abcdefghi"
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        sizes = QUICK if options.quick else Sizes()
        if not options.report_only:
            run(options.out, sizes, options.workers, options.cache_dir, options.questions)
        write_report(options.out, sizes, options.questions)
        if options.publish is not None:
            publish(options.out, options.publish)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.claims.run: {error}") from error
    print((options.out / "claims.md").read_text())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.claims.run", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for runs, tables and figures")
    parser.add_argument("--quick", action="store_true", help="everything runs, nothing is learned well: minutes")
    parser.add_argument("--questions", type=questions_of, default=QUESTIONS, help="such as h,i; default: all")
    parser.add_argument("--report_only", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--publish", type=Path, help="a Markdown page that gets the tables")
    parser.add_argument("--cache_dir", help="of the data; default: ~/.cache/lskip")
    return parser.parse_args(arguments)


def questions_of(text: str) -> str:
    """Return the letters of a list such as h,i.

    Raises:
        ArgumentTypeError: one is not a question.
    """
    letters = text.replace(",", "")
    if not letters or set(letters) - set(QUESTIONS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of letters from a to {QUESTIONS[-1]}")
    return letters


def run(out: Path, sizes: Sizes, workers: int, cache_dir: str | None, questions: str = QUESTIONS) -> None:
    """Run what is missing in `out`.

    Raises:
        ValueError: `out` holds runs of other sizes, or workers is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers: {workers} is not a whole number from 1 up")
    torch.set_num_threads(1)  # as the workers have
    out.mkdir(parents=True, exist_ok=True)
    check_sizes(out, sizes)
    make_data(sizes, 0, cache_dir).setup("fit")  # once, before several processes want it
    if set(questions) & set(PAPER):
        for jobs in (trainings(out, sizes, cache_dir), followers(out, sizes, cache_dir)):
            work(jobs, workers)
        if not (out / STEP_TIMES).is_file():
            write_json(out / STEP_TIMES, time_curricula(sizes))
    work(recipe_trainings(out, sizes, cache_dir, questions), workers)


def write_report(out: Path, sizes: Sizes, questions: str = QUESTIONS) -> None:
    """Write claims.md and its figures: of a to g all runs must be there, of h and i those that are.

    Raises:
        ValueError: `out` holds no runs, or runs of other sizes.
    """
    if not (out / "sizes.json").is_file():
        raise ValueError(f"out: '{out}' holds no runs")
    check_sizes(out, sizes)
    sections = make_sections(Results(out, sizes), questions)
    for section in sections:
        for name, figure in section.figures.items():
            figure.savefig(out / name, dpi=130)
    (out / "claims.md").write_text(report(sections, environment(CPU)))


def check_sizes(out: Path, sizes: Sizes) -> None:
    path = out / "sizes.json"
    # Sizes that came later than the folder's runs are not theirs.
    if path.is_file() and {**asdict(sizes), **json.loads(path.read_text())} != asdict(sizes):
        raise ValueError(f"out: '{out}' holds runs of other sizes; choose another folder")
    write_json(path, asdict(sizes))


Job = Callable[[], None]


def trainings(out: Path, sizes: Sizes, cache_dir: str | None) -> list[Job]:
    """Return the jobs from scratch: the long plain run first, since it takes longest, then all arms and seeds."""
    arms = make_arms(sizes.layers)
    long = partial(
        train, run_folder(out, LONG, 0), arms[NEITHER], sizes, 0, cache_dir, sizes.long_steps,
        readings=sizes.readings, snapshots=tuple(sizes.snapshots.values()),
    )  # fmt: skip
    jobs = [
        partial(train, run_folder(out, name, seed), arm, sizes, seed, cache_dir, sizes.steps,
                snapshots=(sizes.steps,) if name == BOTH else ())
        for seed in range(sizes.seeds)
        for name, arm in arms.items()
    ]  # fmt: skip
    return [long, *jobs]


def recipe_trainings(out: Path, sizes: Sizes, cache_dir: str | None, questions: str) -> list[Job]:
    """Return the jobs of questions h and i, seed by seed, so that what is finished can be compared."""
    sizes = replace(sizes, batch_size=sizes.recipe_batch_size)
    recipes = {**(make_recipes(sizes) if "h" in questions else {}), **(make_targets(sizes) if "i" in questions else {})}
    return [
        partial(train, run_folder(out, name, seed), recipe.arm, sizes, seed, cache_dir, recipe.steps,
                readings=sizes.recipe_readings)
        for seed in range(sizes.recipe_seeds)
        for name, recipe in recipes.items()
    ]  # fmt: skip


def followers(out: Path, sizes: Sizes, cache_dir: str | None) -> list[Job]:
    """Return the jobs that need trained models: retrofits of the long run, and the tasks."""
    arm, long = make_arms(sizes.layers)[BOTH], run_folder(out, LONG, 0)
    jobs: list[Job] = []
    for seed in range(sizes.seeds):
        folder = run_folder(out, BOTH, seed)
        jobs.append(partial(measure_tasks, folder, folder / f"at_{sizes.steps}", sizes, seed, cache_dir))
        for share, step in sizes.snapshots.items():
            target, source = run_folder(out, f"retrofit_{share}", seed), long / f"at_{step}"
            jobs.append(partial(train, target, arm, sizes, seed, cache_dir, sizes.retrofit_steps, source=source))
    return jobs


def work(jobs: list[Job], workers: int) -> None:
    """Run all jobs, `workers` at a time, each in one thread; the first failure stops the rest."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="Runs"):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def time_curricula(sizes: Sizes) -> dict[str, float]:
    """Curriculum -> median time of a step against LastExit's, interleaved, at steps spread over a run."""
    timed = TimedSizes(
        layers=sizes.layers, vocabulary=sizes.vocabulary, hidden=sizes.hidden, intermediate=sizes.intermediate,
        heads=sizes.heads, batch=sizes.batch_size, length=sizes.block_size,
    )  # fmt: skip
    trained, rounds = Trained(timed, CPU), sizes.timed_rounds

    def step(name: str, number: int) -> None:
        at = number * sizes.steps // rounds + number  # + number: not always the same phase of the rotation
        exits = EarlyExitLoss(E_SCALE, make_curriculum(name))
        trained.exit_weights = exits.exit_weights(min(at, sizes.steps - 1), sizes.steps, sizes.layers)
        trained.step(Kind(exits=True), number)

    seconds = time_rounds({name: partial(step, name) for name in CURRICULA}, rounds, CPU)
    return {name: paired_ratio(seconds, name, "LastExit") for name in CURRICULA}


def publish(out: Path, page: Path) -> None:
    """Put the tables below the page's mark and the figures beside it.

    Raises:
        ValueError: the page has no such line.
    """
    method, mark, _ = page.read_text().partition(MARK)
    if not mark:
        raise ValueError(f"publish: '{page}' has no line {MARK}")
    for figure in out.glob("claims_*.png"):
        (page.parent / figure.name).write_bytes(figure.read_bytes())
    page.write_text(f"{method}{MARK}\n\n{(out / 'claims.md').read_text()}")


if __name__ == "__main__":
    main()
