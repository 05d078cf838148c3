"""The settings of `lskip predict`, saved beside an unfinished output: --resume needs the same ones."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lskip.cli.predict_output import rows_of
from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.options import DecodingOptions, LoadingOptions
from lskip.inference.prompt_file import Prompt
from lskip.inference.settings import AUTO
from lskip.models.reading.sources import digest_of
from lskip.utils.output_files import hidden_beside, write_json
from lskip.utils.untrusted import parse_json, read_text

LOADING = ("dtype", "draft_weights", "exit_adapter", "bit_exact")  # of LoadingOptions; the others change only the speed
ADDED = {"json_schema": None, "regex": None, "weights": AUTO}  # settings that files of before do not name
CHECKED_TOKENS = 32


def answer_settings(decoding: DecodingOptions, loading: LoadingOptions) -> dict[str, Any]:
    """Return all settings that change the answers, as plain types."""
    said = {each.name: _plain(getattr(decoding, each.name)) for each in fields(decoding)}
    said["json_schema"] = None if decoding.schema is None else json.dumps(decoding.schema)
    said |= {name: getattr(loading, name) for name in LOADING}
    said["weights"] = loading.weights if loading.rounds else AUTO
    return {"model": loading.model, "model_files": digest_of(loading.model), **said}


def settings_path(output: Path) -> Path:
    """Return the path of the hidden file with the settings of `output`."""
    return hidden_beside(output, "settings.json")


def check_same_settings(output: Path, settings: dict[str, Any]) -> bool:
    """Return True if `output` was begun with these settings, False if no settings are saved.

    Raises:
        ValueError: the saved settings differ; it names the first that does.
    """
    path = settings_path(output)
    if not path.is_file():
        return False
    try:
        begun = parse_json(read_text(path, "output"), "")
    except ValueError:
        begun = None
    if isinstance(begun, dict):
        begun = ADDED | begun
    if not isinstance(begun, dict) or begun.keys() != settings.keys():
        advice = "remove it to have the answers looked at, or replace both by --overwrite true"
        raise ValueError(f"output: '{path}' does not say how '{output}' was begun; {advice}")
    if begun["model_files"] != settings["model_files"]:
        was = begun["model"] if begun["model"] != settings["model"] else "the same, whose files have changed"
        raise ValueError(f"model: {settings['model']!r}, but '{output}' was begun with {was}; {ADVICE}")
    for name, value in settings.items():
        if name != "model" and begun[name] != value:
            raise ValueError(f"{name}: {value!r}, but '{output}' was begun with {begun[name]!r}; {ADVICE}")
    return True


ADVICE = "name the same, replace it by --overwrite true, or name another output"


def forget_settings(output: Path) -> None:
    """Remove the saved settings of a finished output."""
    if output.is_file():
        settings_path(output).unlink(missing_ok=True)


def keep_settings(output: Path, settings: dict[str, Any]) -> None:
    """Save the settings beside the output, unless that is a pipe or a device."""
    if output.is_file():
        write_json(settings_path(output), settings)


def check_answers(output: Path, prompts: list[Prompt], decoding: DecodingOptions) -> None:
    """Raise ValueError if a line of `output` contradicts these settings (seed, number of tokens)."""
    index_of = {prompt.line: index for index, prompt in enumerate(prompts)}
    for number, row in enumerate(rows_of(output), start=1):
        most, seed = decoding.max_new_tokens, decoding.seed
        expected = {} if seed is None else {"seed": (seed + index_of[row["line"]]) % 2**64}
        if most is not None and (row.get("finish_reason") == "length" or row.get("tokens", 0) > most):
            expected["tokens"] = most
        for name, value in expected.items():
            if row.get(name, value) != value:
                setting = "max_new_tokens" if name == "tokens" else name
                said = f"line {number} of '{output}' has {name} {row[name]}"
                raise ValueError(f"{setting}: {getattr(decoding, setting)}, but {said}; {ADVICE}")


def check_completions(output: Path, completions: bool) -> None:
    """Raise ValueError if the lines of `output` have a completion where these are to have none, or the reverse."""
    if any("completion" in row for row in rows_of(output)) != completions:
        begun = "without it" if completions else "with it"
        raise ValueError(f"completions: {str(completions).lower()}, but '{output}' was begun {begun}; {ADVICE}")


def check_by_answering(
    output: Path, prompts: list[Prompt], generator: TextGenerator, settings: GenerationSettings
) -> None:
    """Raise ValueError unless the model gives the first answer of `output`, or its beginning, once more.

    Checked only where the text is reproducible: in float32, and with greedy or seeded decoding that does not depend on
    the drafts (as acceptance "rejection" does).
    """
    first = next(rows_of(output))
    exact = generator.runner.dtype is torch.float32 and settings.acceptance != "rejection"
    if not exact or (settings.temperature > 0 and settings.seed is None) or "text" not in first:
        return
    asked = next(prompt for prompt in prompts if prompt.line == first["line"])
    tokens = min(settings.max_new_tokens, CHECKED_TOKENS)
    plain = {
        "max_new_tokens": tokens,
        "min_new_tokens": min(settings.min_new_tokens, tokens),
        "seed": first.get("seed"),
    }
    (again,) = (one for _, one in generator.generate_batch([asked.content], 1, **{**vars(settings), **plain}))
    same = again.text == first["text"] if again.finish_reason != "length" else first["text"].startswith(again.text)
    if not same or (tokens == settings.max_new_tokens and again.text != first["text"]):
        raise ValueError(f"output: line 1 of '{output}' is not what this model answers with these settings; {ADVICE}")


def _plain(value: Any) -> Any:
    """Return a setting for JSON; a policy or criterion becomes its class and its public plain attributes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    made_with = {name: part for name, part in vars(value).items() if isinstance(part, bool | int | float | str)}
    return {"class": type(value).__name__, **{name: made_with[name] for name in sorted(made_with) if name[0] != "_"}}
