"""`lskip predict --completions true` writes what `lskip fit` trains on: the tokens that the model saw and said."""

import copy
import json

import pytest

from lskip.cli import main
from lskip.data import TextData
from lskip.inference import load_generator
from tests.conftest import make_model

TEMPLATE = (
    "{% for each in messages %}<{{ each.role }}>{{ each.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["def add(a, b):", "for i in range", "print(", "return a +", "def sub(a", "for b in"]
LONGEST = 8  # tokens of an answer


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    """Two folders, one with a chat template. Some answers end by themselves: 150 other tokens end a text too."""
    folder = tmp_path_factory.mktemp("models")
    for name, template in (("plain", None), ("chat", TEMPLATE)):
        model, tokenizer = make_model(eos_token_id=None), copy.deepcopy(tiny_tokenizer)
        model.generation_config.eos_token_id = [0, *range(150, 300, 10)]
        tokenizer.chat_template = template
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def predict(tmp_path, models):
    """Return a function (model, *options) -> the rows of its output, tmp_path/out.jsonl."""
    lines = [{"prompt": prompt, "number": n} for n, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def call(model: str, *options: str) -> list[dict]:
        files = [f"--prompts={tmp_path}/prompts.jsonl", f"--output={tmp_path}/out.jsonl"]
        more = [f"--max_new_tokens={LONGEST}", "--overwrite=true", "--device=cpu", *options]
        assert main(["predict", f"--model={models / model}", *files, *more]) == 0
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return call


def trained_on(tmp_path, model: str) -> dict[tuple[int, ...], list[int]]:
    """Return what each row of the output trains: tokens that are not scored -> tokens that are."""
    data = TextData(
        str(tmp_path / "out.jsonl"), model, block_size=96, val_fraction=0, test_fraction=0, cache_dir=str(tmp_path)
    )
    found = {}
    for row in data.blocks("train"):
        scored = row["labels"] != -100
        first, last = int(scored.argmax()), len(scored) - int(scored[::-1].argmax())
        assert scored[first:last].all()
        found[tuple(row["input_ids"][:first].tolist())] = row["input_ids"][first:last].tolist()
    return found


@pytest.mark.parametrize("model", ["plain", "chat"])
def test_what_is_trained_is_what_was_seen_and_said(tmp_path, models, predict, tiny_tokenizer, model):
    rows, folder = predict(model, "--completions=true"), str(models / model)
    ended = [row for row in rows if row["finish_reason"] == "eos"]
    assert 0 < len(ended) < len(rows) and {row["finish_reason"] for row in rows} == {"eos", "length"}
    assert [row["completion"] for row in rows] == [row["text"] if row in ended else None for row in rows]
    assert [row["number"] for row in rows] == list(range(len(PROMPTS)))  # carried through
    generator = load_generator(folder)
    end = {"plain": [0], "chat": tiny_tokenizer("\n")["input_ids"]}[model]  # of a text, or of a turn
    with pytest.warns(UserWarning, match=f"{len(rows) - len(ended)} rows have no 'completion' and are left out"):
        found = trained_on(tmp_path, folder)
    expected = {
        tuple(generator.prepare(PROMPTS[row["number"]], generator.settings()).prompt): tiny_tokenizer(row["text"])[
            "input_ids"
        ]
        + end
        for row in ended
    }
    assert found == expected


def test_without_the_option_fit_asks_what_to_do(tmp_path, models, predict):
    assert "completion" not in predict("chat")[0]
    with pytest.raises(ValueError, match=r"source: '.*out.jsonl' has prompts and text, but no completion; .*--compl"):
        trained_on(tmp_path, str(models / "chat"))
    rows = [{"messages": [{"role": "user", "content": "a"}], "text": "b", "finish_reason": "eos"}]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="has prompts and text, but no completion"):
        trained_on(tmp_path, str(models / "chat"))
    options = {"val_fraction": 0, "test_fraction": 0, "cache_dir": str(tmp_path)}
    data = TextData(str(tmp_path / "out.jsonl"), str(models / "chat"), text_column="text", **options)
    assert data.documents("train")["text"][:] == ["b"]


def test_a_resumed_output_keeps_to_it(tmp_path, models, predict, capsys):
    predict("plain", "--completions=true")
    again = [
        "predict",
        f"--model={models}/plain",
        f"--prompts={tmp_path}/prompts.jsonl",
        f"--output={tmp_path}/out.jsonl",
    ]
    assert main([*again, f"--max_new_tokens={LONGEST}", "--resume=true"]) == 2
    assert "completions: false, but" in capsys.readouterr().err
    assert main([*again, f"--max_new_tokens={LONGEST}", "--resume=true", "--completions=true"]) == 0


def test_a_prompt_with_a_completion_is_refused(tmp_path, models, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    files = [f"--prompts={tmp_path}/prompts.jsonl", f"--output={tmp_path}/out.jsonl"]
    assert main(["predict", f"--model={models}/plain", *files, "--completions=true"]) == 2
    assert "prompts: line 1: the key 'completion' is taken" in capsys.readouterr().err
