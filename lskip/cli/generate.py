"""`lskip generate`: the answer to one prompt, streamed."""

import json
import sys
from collections import Counter
from typing import Any

from lskip.evaluation.sweep.tuned import tuned_options
from lskip.inference import Generation, GenerationSettings, TextGenerator
from lskip.inference.drafting.drafter import Available
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.drafting.registry import check_adapter_exit
from lskip.inference.options import DecodingOptions, LoadingOptions
from lskip.inference.prompt_file import read_standard_input
from lskip.utils.checks import check_unicode
from lskip.utils.untrusted import MAX_BYTES, printable


def generate(
    prompt: str, decoding: DecodingOptions, loading: LoadingOptions, task: str | None = None, json: bool = False
) -> None:
    """Answer one prompt: the text on standard output as it comes, the counts on standard error.

    On a terminal control characters of the text are escaped; a file or a pipe gets the text as it is.

    Args:
        prompt: the text to continue or to answer; - reads it from standard input, without a newline at its end.
        decoding: how it is continued.
        loading: which model.
        task: a task that lskip tune has tuned for this model: it sets the draft where the options do not. null: none.
        json: print one JSON object instead, when the answer is done: prompt, text and counts.
    """
    decoding, loading = tuned_options(task, decoding, loading)
    loading = loading.for_draft(decoding.draft)
    settings = decoding.settings()
    prompt = _read_prompt(prompt)
    check_exit_layer(decoding, loading)
    interrupt = None
    generator = loading.load()
    check_adapter_is_used(decoding, loading, generator)
    stream = generator.stream(prompt, **settings)
    try:
        for piece in stream:
            if not json:
                write_text(piece)
    except KeyboardInterrupt as pressed:
        interrupt = pressed
    if json:
        _write_json(prompt, stream.generation)
    else:
        write_text("\n")
        policy = generator.settings(**settings).draft_policy
        print(_summary(stream.generation, policy, generator.draft_weights), file=sys.stderr)
    if interrupt is not None:
        raise interrupt


def check_exit_layer(decoding: DecodingOptions, loading: LoadingOptions) -> None:
    """Raise ValueError, before weights are read, for an exit layer that the model lacks or a draft without one."""
    if decoding.exit_layer is None and not decoding.num_speculations:
        return
    from lskip.models.pretrained import find_source, load_config  # brings the GGUF reader and the hub client

    if find_source(loading.model).kind == "gguf":
        return  # reading its config takes as long as loading it
    layers = getattr(load_config(loading.model), "num_hidden_layers", None)
    if layers is not None and loading.exit_adapter is None:
        GenerationSettings(**decoding.settings()).check_model(Available(layers, loading.draft_weights is not None))


def check_adapter_is_used(decoding: DecodingOptions, loading: LoadingOptions, generator: TextGenerator) -> None:
    """Raise ValueError for an exit_adapter that is named beside what would leave it out in silence."""
    if loading.exit_adapter is None:
        return
    if decoding.exit_criterion is not None:
        raise ValueError("exit_criterion: reads the model's own exits; leave it or the exit_adapter out")
    check_adapter_exit(decoding.exit_layer, generator.runners.available)


def result_fields(generation: Generation) -> dict[str, Any]:
    """Return the text of a result and its counts, as JSON lines and `generate --json` have them."""
    return {
        "text": generation.text,
        "tokens": len(generation.token_ids),
        "seconds": round(generation.seconds, 4),
        "acceptance_rate": generation.acceptance_rate,
        "tokens_per_round": generation.tokens_per_round,
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
    }


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        prompt = read_standard_input("prompt", MAX_BYTES)
        prompt = prompt.removesuffix("\r\n") if prompt.endswith("\r\n") else prompt.removesuffix("\n")
    if not prompt:
        raise ValueError("prompt: is empty; give some text to continue")
    check_unicode("prompt", prompt)
    return prompt


def write_text(text: str) -> None:
    """Write text to standard output, its control characters escaped if that is a terminal."""
    if sys.stdout.isatty():
        text = printable(text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ValueError(f"standard output: {error.strerror}") from error


def _write_json(prompt: str, generation: Generation) -> None:
    fields = {"prompt": prompt, "prompt_tokens": generation.prompt_tokens, **result_fields(generation)}
    write_text(json.dumps(fields, ensure_ascii=False) + "\n")


def _summary(generation: Generation, policy: DraftPolicy | None, draft_weights: str | None) -> str:
    parts = [f"{len(generation.token_ids)} tokens", f"{generation.tokens_per_second:.1f} tokens/s"]
    if generation.acceptance_rate is not None:
        parts.append(f"acceptance_rate {generation.acceptance_rate:.2f}")
        parts.append(f"tokens_per_round {generation.tokens_per_round:.2f}")
    if drafts := Counter(str(done.draft) for done in generation.history if done.draft is not None):
        named = (f"{draft} in {count} round{'s' * (count > 1)}" for draft, count in drafts.most_common())
        parts.append(f"drafted by {', '.join(named)}")
    if generation.mean_exit_layer is not None:
        parts.append(f"mean exit layer {generation.mean_exit_layer:.1f}")
    if draft_weights is not None:
        parts.append(f"draft_weights {draft_weights}")
    if generation.finish_reason is not None:
        parts.append(generation.finish_reason)
    learnt = policy.summary() if policy is not None else {}
    return f"[{', '.join(parts)}]" + (f"\n[{type(policy).__name__}: {_in_words(learnt)}]" if learnt else "")


def _in_words(value: Any) -> str:
    """Return a policy's summary, nested dicts included, on one line."""
    if not isinstance(value, dict):
        return f"{value:.2f}" if isinstance(value, float) else str(value)
    inner = {
        name: f"({_in_words(part)})" if isinstance(part, dict) else _in_words(part) for name, part in value.items()
    }
    return ", ".join(f"{name} {part}" for name, part in inner.items())
