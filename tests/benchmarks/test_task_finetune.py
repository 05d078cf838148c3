"""The task benchmark at tiny size: what it counts, against transformers and against counts by hand."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("process_settings")
ENDS = list(range(0, 300, 4))  # a random model ends no text: a quarter of its tokens end one
NEW_TOKENS = 8


def greedy(model, tokenizer, prompt: str) -> list[int]:
    """The new tokens by transformers."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    answer = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return answer[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def models():
    made = {"layerskip": make_model(seed=0), "plain": make_model(seed=1)}
    for model in made.values():
        model.generation_config.eos_token_id = ENDS
    return made


@pytest.fixture(scope="module")
def pairs(models, tiny_tokenizer):
    """40 pairs: in order the completion is what neither, the first, the second model says."""
    rows = []
    for i in range(40):
        prompt = f"for i in range({i}):"
        wanted = [None, models["layerskip"], models["plain"]][i % 3]
        answer = "nobody says this" if wanted is None else tiny_tokenizer.decode(greedy(wanted, tiny_tokenizer, prompt))
        rows.append({"prompt": prompt, "completion": answer or "nothing", "group": f"group {i // 2}"})
    return rows


@pytest.fixture(scope="module")
def runs(models, pairs, tiny_tokenizer, tmp_path_factory):
    """A folder as `lskip fit` leaves it, as far as the benchmark looks, for each model."""
    root = tmp_path_factory.mktemp("runs")
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name, model in models.items():
        model.save_pretrained(root / name)
        ExitAdapter(model, AdapterShape(1)).save(root / f"{name}_adapter")
        tiny_tokenizer.save_pretrained(root / name)
        write_config(root / name, root / "pairs.jsonl", 0.5)
    return root


def write_config(folder: Path, source: Path, test_fraction: float) -> None:
    split = {"source": str(source), "text_column": None, "val_fraction": 0.05, "test_fraction": test_fraction}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {**split, "block_size": 64}}}))


def arguments(runs: Path, out: Path, *more: str) -> list[str]:
    folders = ["--layerskip", str(runs / "layerskip"), "--plain", str(runs / "plain"), "--out", str(out)]
    return [*folders, "--cache_dir", str(runs / "cache"), "--quick", "--threads", "1", *more]


@pytest.fixture(scope="module")
def output(runs, tmp_path_factory):
    """(the folder that a quick run wrote, what it printed)."""
    from io import StringIO

    from rich.console import Console

    from benchmarks.retrofit.task_finetune import main

    out, printed = tmp_path_factory.mktemp("task") / "result", StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.retrofit.task_finetune.console", Console(file=printed, width=190))
        limits = ("--items", "40", "--agreement_items", "10", "--timed_items", "2")
        main(arguments(runs, out, *limits, "--exit_layers", "2", "--plain_adapter", str(runs / "plain_adapter")))
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def result(output):
    return json.loads((output[0] / "task.json").read_text())


def answers(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"answers_{name}.jsonl").read_text().splitlines()]


def test_exact_match_is_what_transformers_text_gives(output, result, models, pairs, tiny_tokenizer):
    completions = {pair["prompt"]: pair["completion"] for pair in pairs}
    for name, model in models.items():
        right = []
        for row in answers(output[0], name):
            tokens = greedy(model, tiny_tokenizer, row["prompt"])
            said = tiny_tokenizer.decode(tokens, skip_special_tokens=True)
            assert row["answer"] == said and row["completion"] == completions[row["prompt"]]
            right.append(said == row["completion"] and tokens[-1] in ENDS)
            assert row["right"] == right[-1]
        assert result["exact_match"][name] == pytest.approx(sum(right) / len(right))
        assert 0 < sum(right) < len(right) == result["items"]
    first, second = ({row["prompt"]: row["right"] for row in answers(output[0], name)} for name in models)
    assert first.keys() == second.keys()
    difference = result["difference"]
    assert difference["only_layerskip"] == sum(first[prompt] > second[prompt] for prompt in first)
    assert difference["only_plain"] == sum(first[prompt] < second[prompt] for prompt in first)


def test_an_answer_that_did_not_end_is_wrong(runs, models, tiny_tokenizer):
    from benchmarks.decoding.lskip_methods import Generators
    from benchmarks.retrofit.task_finetune import Items, answer, parse

    model, prompt = models["layerskip"], "for i in range(1):"
    tokens = greedy(model, tiny_tokenizer, prompt)[:1]
    model.generation_config.eos_token_id = None
    cut = tiny_tokenizer.decode(tokens)
    options = parse(arguments(runs, runs / "nothing", "--max_new_tokens", "1"))
    items = Items([prompt], [cut], [prompt])
    generator = Generators(model).drafting_with(None)
    with (runs / "answers.jsonl").open("w") as file:
        texts, right = answer(generator, tiny_tokenizer, [tiny_tokenizer(prompt).input_ids], items, options, file)
    model.generation_config.eos_token_id = ENDS
    assert texts == [tokens] and right == [False]


@torch.inference_mode()
def test_draft_agreement_is_each_exits_share_of_the_models_own_tokens(runs, output, result, models, tiny_tokenizer):
    from benchmarks.retrofit.task_finetune import held_out, parse

    first = held_out(parse(arguments(runs, output[0], "--items", "10"))).prompts
    assert len(first) == 10 < result["items"]
    for name, model in models.items():
        hits, count = torch.zeros(4), 0
        for text in first:
            prompt, tokens = tiny_tokenizer(text).input_ids, greedy(model, tiny_tokenizer, text)
            states = model(torch.tensor([prompt + tokens]), output_hidden_states=True).hidden_states[1:]
            for layer, state in enumerate(states):  # transformers has put the last one through the norm already
                normed = state if layer == 3 else model.model.norm(state)
                said = model.lm_head(normed)[0].argmax(-1)[len(prompt) - 1 : -1]
                hits[layer] += (said == torch.tensor(tokens)).sum()
            count += len(tokens)
        assert result["draft_agreement"][name] == pytest.approx((hits / count).tolist())
        assert result["draft_agreement"][name][3] == 1 > result["draft_agreement"][name][1]


def test_two_models_by_hand():
    from benchmarks.retrofit.task_scores import compare

    found = compare([True, True, False, True], [True, False, False, False], ["a", "b", "c", "d"])
    assert (found["difference"], found["only_layerskip"], found["only_plain"]) == (0.5, 2, 0)
    assert found["mcnemar_p"] == 0.5  # two of two: 2 * (1/2)^2
    # Drawn 4 times of (0, 1, 0, 1): the mean is binomial, below 0.025 with probability 1/16.
    assert found["interval"] == [0, 1]
    assert compare([True] * 6, [False] * 5 + [True], list("abcdef"))["mcnemar_p"] == 2 / 2**5
    assert compare([True, False], [True, False], ["a", "b"])["mcnemar_p"] == 1


def test_items_of_a_group_are_drawn_together():
    from benchmarks.retrofit.task_scores import compare

    ours, plain = [True] * 50 + [False] * 50, [False] * 100
    alone = compare(ours, plain, [str(i) for i in range(100)])["interval"]
    together = compare(ours, plain, [str(i // 50) for i in range(100)])["interval"]
    assert together == [0, 1] and 0.35 < alone[0] < 0.45 < 0.55 < alone[1] < 0.65


def test_every_draft_is_timed_and_changes_no_text(result):
    settings = {name: [r for r in result["decoding"] if r["model"] == name] for name in ("layerskip", "plain")}
    kinds = {name: {(r["draft"], r["exit_layer"], r["policy"]) for r in rows} for name, rows in settings.items()}
    rounded = ("int8", "int4")
    untrained = {(draft, None, "fixed") for draft in (*rounded, "ngram")}
    adaptive = {(f"{copy}any", None, "cost_aware") for copy in ("", "int8+", "int4+")} | {(None, None, None)}
    assert kinds["plain"] == untrained | adaptive | {("adapter", None, "fixed")}
    at_exit = {(draft, 2, "fixed") for draft in ("layers", *rounded)}
    assert kinds["layerskip"] == untrained | adaptive | at_exit
    for record in result["decoding"]:
        assert record["mismatches"] == 0 and record["over_autoregressive"] > 0 and record["tokens_per_round"] >= 1


def test_it_says_what_it_found(output, result):
    out, printed = output
    assert "exact match" in printed and "draft_agreement, layer 4" in printed and "McNemar p" in printed
    assert f"{result['exact_match']['layerskip']:.3f}" in printed and "Decoding with plain" in printed
    environment = json.loads((out / "environment.json").read_text())
    assert {"date", "hardware", "threads", "lskip", "options"} <= set(environment)


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda runs: write_config(runs / "plain", runs / "pairs.jsonl", 0.4), (), "plain: its data are .*must be"),
        (lambda runs: (runs / "plain" / "config.yaml").unlink(), (), "is no run of lskip fit"),
        (lambda runs: None, ("--exit_layers", "4"), "exit_layers: 4 is not from 1 to 3"),
        (lambda runs: None, ("--drafts", "int8,int3"), "drafts: 'int3'"),
    ],
)
def test_bad_input(runs, tmp_path, change, more, message):
    from benchmarks.retrofit.task_finetune import main

    kept = (runs / "plain" / "config.yaml").read_text()
    change(runs)
    try:
        with pytest.raises(SystemExit, match=message) as refused:
            main(arguments(runs, tmp_path / "out", *more))
    finally:
        (runs / "plain" / "config.yaml").write_text(kept)
    assert "\n" not in str(refused.value)


def test_results_of_several_seeds_are_put_together(output, result, capsys):
    from benchmarks.retrofit.task_seeds import main

    main([str(output[0]), str(output[0])])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"exact match, plain: {result['exact_match']['plain']:.4f}" in printed
    assert f"layerskip less plain: {result['difference']['difference']:+.4f}" in printed
    assert f"(2 seeds, {result['items']} items of {result['groups']} groups)" in printed


def test_the_interval_is_drawn_over_seeds_and_groups():
    import numpy as np

    from benchmarks.retrofit.task_seeds import interval

    alike, each = np.array([0, 0, 1, 1]), np.arange(4)
    assert interval(np.array([[1, 1, 0, 0]]), alike) == [0, 1]  # a quarter of the draws have one group twice
    assert interval(np.array([[1] * 4, [-1] * 4]), each) == [-1, 1]  # of the seeds likewise
    assert interval(np.array([[1] * 4, [1] * 4]), each) == [1, 1]


def test_seeds_of_other_items_are_refused(output, tmp_path):
    from benchmarks.retrofit.task_seeds import main

    for name in ("layerskip", "plain"):
        lines = (output[0] / f"answers_{name}.jsonl").read_text().splitlines()
        (tmp_path / f"answers_{name}.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(SystemExit, match="has not answered the same items"):
        main([str(output[0]), str(tmp_path)])
