"""The claims benchmark at tiny size: every arm runs once, results are kept, and its arithmetic is right by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("process_settings")


def in_this_process(jobs, workers):
    for job in jobs:
        job()


@pytest.fixture(scope="module")
def sizes(process_settings, tmp_path_factory):
    from benchmarks.claims.arms import QUICK

    corpus = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    lines = (json.dumps({"text": f"def f{i}(x, y):\n    return x + {i} * y\n" * 8}) for i in range(80))
    corpus.write_text("\n".join(lines))
    return replace(
        QUICK, source=str(corpus), layers=4, hidden=16, intermediate=32, heads=2, vocabulary=300, block_size=32,
        batch_size=2, steps=2, long_steps=100, retrofit_steps=2, max_val_blocks=6, items=5, prompt_tokens=12,
        answer_tokens=6, warmup_steps=1, timed_rounds=2, recipe_steps=4, recipe_readings=2, recipe_seeds=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def out(sizes, tmp_path_factory):
    """The folder of a benchmark that has run."""
    from benchmarks.claims import run as claims

    folder = tmp_path_factory.mktemp("claims")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "work", in_this_process)
        claims.run(folder / "out", sizes, 1, str(folder / "cache"))
    claims.write_report(folder / "out", sizes)
    return folder / "out"


def test_every_question_has_its_table_and_claims(out):
    page = (out / "claims.md").read_text()
    for question in "abcdefghi":
        section = page.split(f"### ({question}) ")[1].split("###")[0]
        assert "| ---" in section and ("- " in section or question == "g")
        assert question not in "hi" or "seeds finished: 2" in section
        assert "nan" not in section.split("| layer |")[0]
    assert "### What did not reproduce" in page and "torch 2" in page
    for name in ("claims_depth.png", "claims_time.png", "claims_tasks.png"):
        assert f"({name})" in page and (out / name).stat().st_size > 5000


def test_arms_are_shared_and_each_is_a_folder_per_seed(out, sizes):
    from benchmarks.claims.arms import make_arms, make_recipes, make_targets

    names = {path.name for path in (out / "runs").iterdir()}
    recipes = {**make_recipes(sizes), **make_targets(sizes)}
    assert names == {*make_arms(sizes.layers), *recipes, "long", "retrofit_10", "retrofit_50", "retrofit_100"}
    assert len(make_arms(sizes.layers)) == 9 + 2 + 2 + 1 and len(recipes) == 2 + 2 * 3 + 2
    results = [json.loads(path.read_text()) for path in (out / "runs").rglob("result.json")]
    assert len(results) == (14 + 3) * sizes.seeds + 1 + 10 * sizes.recipe_seeds
    assert all(result["readings"][-1]["step"] == result["steps"] for result in results)
    assert not list((out / "runs").rglob("last.ckpt"))


def test_a_rerun_trains_nothing_and_says_the_same(out, sizes, monkeypatch):
    from benchmarks.claims import run as claims
    from benchmarks.claims import training as claims_training

    page = (out / "claims.md").read_text()
    monkeypatch.setattr(claims, "work", in_this_process)
    monkeypatch.setattr(claims_training, "Trainer", None)
    claims.run(out, sizes, 1, str(out.parent / "cache"))
    claims.write_report(out, sizes)
    assert (out / "claims.md").read_text() == page


def test_other_sizes_do_not_mix_with_what_is_there(out, sizes):
    from benchmarks.claims import run as claims

    with pytest.raises(ValueError, match="holds runs of other sizes"):
        claims.run(out, replace(sizes, steps=3), 1, str(out.parent / "cache"))


def test_questions_h_and_i_are_reported_over_the_seeds_that_are_finished(out, sizes, tmp_path):
    import shutil

    from benchmarks.claims.run import write_report

    shutil.copytree(out, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "runs" / "recipe_falling" / "seed_0")
    shutil.rmtree(tmp_path / "part" / "runs" / "long")
    write_report(tmp_path / "part", sizes, "hi")
    page = (tmp_path / "part" / "claims.md").read_text()
    question_h, question_i = page.split("### (h) Recipes")[1].split("### (i) Targets")
    assert "seeds finished: 1" in question_h and "one seed: no verdict" in question_h
    assert "seeds finished: 2" in question_i
    assert "### (a)" not in page
    shutil.rmtree(tmp_path / "part" / "runs")
    write_report(tmp_path / "part", sizes, "hi")
    assert "no seed is finished" in (tmp_path / "part" / "claims.md").read_text()
    with pytest.raises(ValueError, match="holds no runs"):
        write_report(tmp_path / "none", sizes, "hi")


def test_runs_of_before_there_were_sizes_for_recipes_go_on(sizes, tmp_path):
    from dataclasses import asdict

    from benchmarks.claims.run import check_sizes

    before = {name: value for name, value in asdict(sizes).items() if not name.startswith("recipe_")}
    (tmp_path / "sizes.json").write_text(json.dumps(before))
    check_sizes(tmp_path, sizes)
    assert json.loads((tmp_path / "sizes.json").read_text()) == asdict(sizes)


@pytest.mark.parametrize("letters", ["h,j", "", "h i"])
def test_a_question_that_is_none_is_refused(letters, capsys):
    from benchmarks.claims.run import parse

    with pytest.raises(SystemExit):
        parse(["--out=x", f"--questions={letters}"])
    assert "from a to i" in capsys.readouterr().err


def test_equal_flops_by_hand():
    from benchmarks.claims.arms import Arm, Sizes, share_of_blocks, steps_at_equal_flops

    # 3 of 8 blocks are dropped at 0.5.
    arm = Arm(0.5, "Alternating", time="Constant")
    assert share_of_blocks(arm, 8, 10) == pytest.approx(1 - 1.5 / 8)
    # 1000 / 0.8125 is 1230.8, and the next number of steps that four readings divide 1232.
    assert steps_at_equal_flops(arm, Sizes(recipe_steps=1000)) == 1232
    # The paper's: its mean over depth times its mean over time, both of (2^x - 1).
    steps, layers = 5, 3
    mean_time = sum(2 ** (step / 4) - 1 for step in range(steps)) / steps
    mean_depth = sum(2 ** (block / 2) - 1 for block in range(layers)) / layers
    rising = Arm(0.2, "Exponential", time="Exponential")
    assert share_of_blocks(rising, layers, steps) == pytest.approx(1 - 0.2 * mean_time * mean_depth)


def test_a_long_run_that_was_killed_goes_on_with_its_readings(out, sizes, tmp_path, monkeypatch):
    from benchmarks.claims.arms import Arm
    from benchmarks.claims.training import Readings, train

    class Killed(Exception):
        pass

    arguments = (tmp_path, Arm(), sizes, 0, str(out.parent / "cache"), sizes.long_steps)
    more = {"readings": sizes.readings, "snapshots": tuple(sizes.snapshots.values())}
    read = Readings.on_validation_end

    def killed_at_seventy(self, trainer, module):
        if trainer.global_step == 70:
            raise Killed
        read(self, trainer, module)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Readings, "on_validation_end", killed_at_seventy)
        train(*arguments, **more)
    assert not (tmp_path / "result.json").exists()
    train(*arguments, **more)
    whole = json.loads((out / "runs" / "long" / "seed_0" / "result.json").read_text())["readings"]
    assert json.loads((tmp_path / "result.json").read_text())["readings"] == whole
    assert [reading["step"] for reading in whole] == list(range(10, 101, 10))


def test_dropout_rates_of_question_a_have_one_mean(sizes):
    from benchmarks.claims.arms import P_DEPTH, make_arms

    arms, means = make_arms(8), set()
    for name in (f"p{P_DEPTH:g}_e0", "depth_Linear", "depth_Constant"):
        (dropout,) = arms[name].callbacks()
        means.add(round(sum(dropout.drop_rates(0, None, 8)) / 8, 12))
    by_hand = P_DEPTH * sum(2 ** (block / 7) - 1 for block in range(8)) / 8
    assert means == {round(by_hand, 12)}


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.9, 1.0, 1.1), "reproduced"),  # 1 ± 4.303 * 0.0577
        ((-0.9, -1.0, -1.1), "not reproduced"),
        ((0.1, 1.0, 1.9), "within noise"),  # 1 ± 4.303 * 0.52
        ((1.0,), "one seed: no verdict"),
    ],
)
def test_verdicts(differences, verdict):
    from benchmarks.claims.statistics import Claim

    assert Claim("it holds", differences).verdict() == verdict
    assert verdict in Claim("it holds", differences).line()


def test_mean_and_standard_error_by_hand():
    from benchmarks.claims.statistics import with_error

    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, error sqrt(7 / 3)
    assert with_error([1, 2, 6]) == f"3.000 ± {math.sqrt(7 / 3):.3f}"


def test_interval_by_hand():
    from benchmarks.claims.statistics import with_interval

    # 1, 2, 6 again; Student's t for 2 degrees of freedom is 4.303
    margin = 4.303 * math.sqrt(7 / 3)
    assert with_interval([1, 2, 6]) == f"+3.000 [{3 - margin:+.3f}, {3 + margin:+.3f}]"
    assert with_interval([0.5]) == "+0.500"


def test_multiple_choice_is_the_likelihood_that_transformers_gives(tiny_model):
    from benchmarks.claims.tasks import CHOICES, multiple_choice
    from lskip.models.decoder import Decoder

    model = tiny_model()
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 300, (30, 4), generator=random)
    answers = torch.randint(0, 300, (30, 3), generator=random)
    # Half of the items are answered as the model itself would, so that accuracy is neither 0 nor chance.
    answers[:15] = model.generate(prompts[:15], max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, 4:]
    found = multiple_choice(Decoder(model), prompts, answers, seed=0)

    import numpy as np

    draws, right = np.random.default_rng(0), 0
    for item in range(30):
        others = draws.choice(np.delete(np.arange(30), item), CHOICES - 1, replace=False)
        scores = []
        for option in [item, *others]:
            ids = torch.cat([prompts[item], answers[option]])[None]
            log_p = model(ids).logits[0, 3:-1].log_softmax(-1)
            scores.append(log_p.gather(1, answers[option][:, None]).sum().item())
        right += max(range(CHOICES), key=scores.__getitem__) == 0
    assert found[-1] == pytest.approx(right / 30) and 0.5 < found[-1] < 1
    assert len(found) == 4


def test_open_generation_compares_greedy_text(tiny_model):
    from benchmarks.claims.tasks import open_generation

    model = tiny_model(eos_token_id=None)
    prompts = torch.randint(0, 300, (4, 5), generator=torch.Generator().manual_seed(1))
    own = model.generate(prompts, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 5:]
    assert open_generation(model, prompts, own, exit_layer=4)[0] == 1.0
    assert open_generation(model, prompts, own, exit_layer=2)[0] < 0.9


def test_what_an_exit_keeps_is_counted_above_chance(sizes, tmp_path):
    from benchmarks.claims.arms import BOTH
    from benchmarks.claims.results import Results, run_folder

    folder = run_folder(tmp_path, BOTH, 0)
    folder.mkdir(parents=True)
    scores = {"multiple_choice": [0.25, 0.5, 0.75], "multiple_choice_chance": 0.25}
    scores |= {"open_generation": [0.1, 0.2, 0.4], "open_generation_chance": [0.1, 0.1, 0.2]}
    (folder / "tasks.json").write_text(json.dumps(scores))
    results = Results(tmp_path, replace(sizes, seeds=1))
    assert results.retention("multiple_choice") == [[0, 0.5, 1]]
    assert results.retention("open_generation") == [pytest.approx([0, 0.5, 1])]


def test_publishing_replaces_what_stands_below_the_mark(out, tmp_path):
    from benchmarks.claims.run import MARK, publish

    page = tmp_path / "claims.md"
    page.write_text(f"# Claims\n\nMethod.\n\n{MARK}\n\nold\n")
    publish(out, page)
    text = page.read_text()
    assert text.startswith("# Claims\n\nMethod.") and "\nold\n" not in text and "### (a)" in text
    assert (tmp_path / "claims_depth.png").is_file()
    page.write_text("no mark")
    with pytest.raises(ValueError, match="has no line"):
        publish(out, page)


def test_the_page_of_the_tree_can_be_published():
    from benchmarks.claims.run import MARK

    pages = list((Path(__file__).parents[2] / "benchmarks" / "results").glob("*-claims.md"))
    assert pages and all(MARK in page.read_text() for page in pages)
