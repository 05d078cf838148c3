"""Bad task files of lm-eval, bad prompts with references for sweep and tune, bad answers for adapt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from benchmarks.bad_input.checks import holds, json_holds
from benchmarks.bad_input.fixtures import PROMPTS, adapt_arguments
from benchmarks.bad_input.options import BASES, own_task
from benchmarks.bad_input.verdict import Case, Right, done, either, refused

SCORED = done(json_holds("out.json", lambda found: found["results"]))
GOOD = [{"prompt": prompt, "reference": "pass"} for prompt in PROMPTS]
ANSWERS = [{"prompt": f"def f{i}(a):", "text": f"return a + {i}", "finish_reason": "length"} for i in range(60)]


def cases(random: Random) -> Iterator[Case]:
    yield from harness(random)
    yield from local_tasks(random)
    yield from answer_files(random)


def harness(random: Random) -> Iterator[Case]:
    """Yield lm-eval tasks in an own folder with one error each."""
    changed = {
        # (What a task of one's own computes takes its time: lm-eval runs functions that it names, too.)
        "doc_to_text": ["{{nope.x}}", "{% if %}", "{{question", 5, "{% for i in range(10**5) %}x{% endfor %}"],
        "doc_to_target": ["{{nope}}", "nobody"],
        "doc_to_choice": ["{{nope}}", [], "x", ["a", "a"]],
        "output_type": ["nope", None],
        "test_split": ["nope", 5],
        "metric_list": [[{"metric": "nope"}], [], "acc", [{}]],
        "dataset_path": ["no_owner/no_such", "nope", "../../etc"],
        "task": [5, [], "\x1b[2J"],
        "unknown": [1],
        "num_fewshot": [10**6, -1],
    }
    named = refused("tasks|include_path")
    for name, values in changed.items():
        for value in values:
            right = either(named, SCORED)
            yield of_task(
                f"{name}: {str(value)[:40]!r}", right, lambda here, n=name, v=value: own_task(here / "tasks", **{n: v})
            )
    texts = {
        "no YAML": "task: [own\n",
        "a list": "- task: own\n",
        "nothing": "",
        "noise": random.randbytes(200).decode("latin-1"),
        "a tag": "task: own\ndoc_to_text: !!python/object/apply:os.system ['touch MARK']\n",
        "aliases": "task: own\na: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
        "itself": "include: own.yaml\ntask: own\n",
    }
    for what, text in texts.items():
        yield of_task(
            what, named, lambda here, t=text: (own_task(here / "tasks"), (here / "tasks" / "own.yaml").write_text(t))
        )
    documents = {"empty": "", "cut": '{"question": "a', "other columns": '{"a": 1}\n', "noise": "\0\1\2"}
    for what, text in documents.items():
        write = lambda here, t=text: (own_task(here / "tasks"), (here / "tasks" / "documents.jsonl").write_text(t))  # noqa: E731
        yield of_task(f"documents: {what}", named, write)


def of_task(what: str, right: Right, prepare: Callable[[Path], object]) -> Case:
    return Case("evaluate", "task of lm-eval", what, BASES["evaluate"][0], right, prepare, makes=("out.json",))


def mutations(lines: list[dict], random: Random) -> Iterator[tuple[str, bytes, bool]]:
    """Yield (description, content, whether it is valid) for a JSON Lines file."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    yield "byte order mark", b"\xef\xbb\xbf" + data, True
    yield "CRLF", data.replace(b"\n", b"\r\n"), True
    yield "utf-16", data.decode().encode("utf-16"), False
    yield "empty", b"", False
    yield "noise", random.randbytes(400), False
    yield "a list", json.dumps(lines).encode(), False
    yield "5000 digits", data + b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}\n", False
    yield "nested 100,000 deep", data + b"[" * 100_000 + b"\n", False
    for _ in range(3):
        cut = random.randrange(2, len(data) - 2)
        if data[cut - 1 : cut + 1].count(b"\n") == 0:
            yield f"cut at byte {cut}", data[:cut], False


def local_tasks(random: Random) -> Iterator[Case]:
    """Yield files of prompts and references for sweep and tune."""
    for what, data, right in mutations(GOOD, random):
        yield of_examples(random.choice(["sweep", "tune"]), what, right, data)
    wrong = [
        *(("reference", value) for value in (None, 5, ["a"], {"a": 1})),
        ("prompt", 5),
        ("prompt", ""),
        ("messages", []),
    ]
    for key, value in wrong:
        data = "".join(json.dumps(line) + "\n" for line in [*GOOD, {**GOOD[0], key: value}]).encode()
        yield of_examples(random.choice(["sweep", "tune"]), f"{key}: {value!r}", False, data)
    surrogate = b'{"prompt": "\\ud83d", "reference": "a"}\n'
    yield of_examples("sweep", "half a surrogate", False, surrogate)
    yield of_examples("tune", "half a surrogate", False, surrogate)
    long = json.dumps({"prompt": "x y " * 500, "reference": "a"}).encode() + b"\n"
    yield of_examples("sweep", "every prompt too long", False, long)
    options = {
        "metrics": ["[nope]", "x", "[]"],
        "stop_strings": ["['']", "[5]"],
        "max_new_tokens": [0, "x", 10**30],
        "chat": [5],
    }
    for name, values in options.items():
        for value in values:
            data = "".join(json.dumps(line) + "\n" for line in GOOD).encode()
            good = (name, value) == ("metrics", "[]")
            yield of_examples(
                random.choice(["sweep", "tune"]), f"{name}={value}", good or None, data, f"--task.{name}={value}"
            )


def of_examples(command: str, what: str, right: bool | None, data: bytes, *more: str) -> Case:
    """Return a case; `right` None: the error names the last option."""
    whole = done(holds("sweep.json")) if command == "sweep" else done(holds("tuned.json", folder="model"))
    named = refused(
        "path|task|prompts|line" if right is False else more[0].partition("=")[0].rpartition(".")[2] if more else ""
    )
    expected = either(whole, named) if right and more else whole if right else named
    base = tuple(each for each in BASES[command][0] if not each.startswith("--task.path"))

    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "llama", here / "model")
        (here / "t.jsonl").write_bytes(data)

    arguments = (*base, "--task.path={here}/t.jsonl", *more)
    return Case(command, "local task", what, arguments, expected, prepare, makes=("out", "model"))


def answer_files(random: Random) -> Iterator[Case]:
    """Yield answers and prompts for adapt."""
    base = tuple(each for each in adapt_arguments("{place}") if not each.startswith(("--answers", "--cache_dir")))
    base = (*base, "--cache_dir={here}/cache", "--output={here}/out")
    learnt = done(holds("adapter.safetensors", "metrics.json"))

    def of(what: str, right: Right, data: bytes, option: str = "answers") -> Case:
        value = "[{here}/a.jsonl]" if option == "answers" else "{here}/a.jsonl"
        more = ("--max_new_tokens=4",) if option == "prompts" else ()
        return Case(
            "adapt",
            option,
            what,
            (*base, f"--{option}={value}", *more),
            right,
            lambda here: (here / "a.jsonl").write_bytes(data),
        )

    for what, data, right in mutations(ANSWERS, random):
        yield of(what, learnt if right else refused("answers"), data)
        prompts = data if right else data.replace(b'"text"', b'"kept"')
        if not right:
            yield of(what, refused("prompts"), prompts, "prompts")
    values = [
        ("text", 5),
        ("text", None),
        ("text", "\ud83d"),
        ("prompt", 5),
        ("prompt", ""),
        ("messages", []),
        ("prompt", "\udfff"),
    ]
    for key, value in values:
        lines = [*ANSWERS, {**ANSWERS[0], key: value}]
        yield of(f"{key}: {value!a}", refused("answers"), "".join(json.dumps(line) + "\n" for line in lines).encode())
    for key, value in [("finish_reason", 5), ("finish_reason", None), ("text", "\0\x1b"), ("line", "x")]:
        lines = [*ANSWERS, {**ANSWERS[0], key: value}]
        yield of(
            f"{key}: {value!a}",
            either(learnt, refused("answers")),
            "".join(json.dumps(line) + "\n" for line in lines).encode(),
        )
    yield of(
        "three alone", refused("answers|batch_size"), "".join(json.dumps(line) + "\n" for line in ANSWERS[:3]).encode()
    )
    yield of("one sixty times", refused("answers|batch_size"), (json.dumps(ANSWERS[0]) + "\n").encode() * 60)
    yield of(
        "too long for block_size",
        refused("answers"),
        "".join(json.dumps({**line, "prompt": "a b " * 90}) + "\n" for line in ANSWERS).encode(),
    )
