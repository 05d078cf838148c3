"""`lskip predict`: answers to a file of prompts, decoded in batches."""

import sys
import time
from collections.abc import Iterable
from functools import partial

from tqdm import tqdm

from lskip.cli.generate import check_adapter_is_used, check_exit_layer, result_fields
from lskip.cli.predict_output import AnswerFile, lock_output, put_in_order, start_output
from lskip.cli.predict_settings import (
    answer_settings,
    check_answers,
    check_by_answering,
    check_completions,
    check_same_settings,
    forget_settings,
    keep_settings,
)
from lskip.evaluation.sweep.tuned import tuned_options
from lskip.inference import Generation
from lskip.inference.options import DecodingOptions, LoadingOptions
from lskip.inference.prompt_file import Prompt, read_prompts
from lskip.utils.checks import check_whole
from lskip.utils.console import say
from lskip.utils.user_paths import user_path


def predict(
    prompts: str,
    output: str,
    decoding: DecodingOptions,
    loading: LoadingOptions,
    task: str | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    resume: bool = False,
    completions: bool = False,
) -> None:
    """Answer a file of prompts, several at a time: one JSON line each, written as soon as it is done.

    Args:
        prompts: a .txt file with a prompt a line, or .jsonl with {"prompt": …} or {"messages": …} a line;
            other keys are carried through. - is standard input, in either form.
        output: .jsonl file to write, in the end in the order of the prompts. A line has the keys of its prompt and
            line, text, tokens, seconds, acceptance_rate, tokens_per_round, finish_reason, seed.
        decoding: how a prompt is continued. The prompt of index i (from 0, blank lines left out) has seed + i.
        loading: which model.
        task: a task that lskip tune has tuned for this model: it sets the draft where the options do not. null: none.
        batch_size: prompts that are answered together; a finished one makes room for the next.
        overwrite: start over an existing output.
        resume: go on with an existing output, with the prompts that it does not answer yet; with the same settings.
        completions: make the output a training file of fit, with the answer as completion too: null, which fit leaves
            out, where a limit cut it. Prompts that go through the chat template are written as messages.
    """
    decoding, loading = tuned_options(task, decoding, loading)
    loading = loading.for_draft(decoding.draft)
    settings = decoding.settings()
    check_whole("batch_size", batch_size, 1)
    source = user_path(prompts, "prompts")
    asked = read_prompts(source)
    if completions:
        chat = uses_chat_template(decoding, loading)
        asked = [prompt.to_train_on(chat) for prompt in asked]
    with lock_output(user_path(output, "output"), source) as path:
        answered, mode = start_output(path, asked, overwrite, resume)
        if answered:
            check_completions(path, completions)
        check_exit_layer(decoding, loading)
        saved = answer_settings(decoding, loading)
        is_known = not answered or check_same_settings(path, saved)
        if not is_known:
            check_answers(path, asked, decoding)
        missing = [index for index in range(len(asked)) if index not in answered]
        speed = "all were there"
        if missing:
            generator = loading.load(min(batch_size, len(missing)))
            check_adapter_is_used(decoding, loading, generator)
            chosen = generator.settings(**settings)
            if not is_known:
                check_by_answering(path, asked, generator, chosen)
            ids = [asked[index].encode(generator, chosen) for index in missing]
            results = generator.generate_batch(ids, batch_size, missing, **settings)
            with AnswerFile(path, mode, partial(keep_settings, path, saved)) as file:
                speed = _write_answers(file, asked, results, len(answered), completions)
        put_in_order(path)
        forget_settings(path)
    say(f"{len(asked)} answers in '{output}' ({speed})", sys.stderr)


def _write_answers(
    file: AnswerFile,
    asked: list[Prompt],
    results: Iterable[tuple[int, Generation]],
    num_answered: int,
    completions: bool,
) -> str:
    """Write each (index, result) as it comes, and return the number of tokens and their rate in words."""
    tokens, began = 0, time.perf_counter()
    with tqdm(initial=num_answered, total=len(asked), unit="prompt", desc="predict") as bar:
        try:
            for index, generation in results:
                row = {**asked[index].fields, "line": asked[index].line, **result_fields(generation)}
                file.write(row | {"completion": completion_of(generation)} if completions else row)
                tokens += len(generation.token_ids)
                bar.set_postfix_str(speed := _rate(tokens, time.perf_counter() - began), refresh=False)
                bar.update()
        except KeyboardInterrupt as pressed:
            message = f", {bar.n} of {len(asked)} prompts are done; go on with --resume true"
            raise type(pressed)(message) from None
    return f"{tokens} tokens, {speed}"


def completion_of(generation: Generation) -> str | None:
    """Return the answer as fit trains on it, with an end behind it; None where the model did not end it."""
    return generation.text if generation.finish_reason in ("eos", "stop_string") else None


def uses_chat_template(decoding: DecodingOptions, loading: LoadingOptions) -> bool:
    """Return whether a plain prompt goes through the model's chat template."""
    from lskip.models.pretrained import load_tokenizer  # brings the GGUF reader and the hub client
    from lskip.models.prompt_form import uses_template  # brings transformers

    return uses_template(load_tokenizer(loading.model), decoding.chat)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds if seconds else 0.0:.1f} tokens/s"
