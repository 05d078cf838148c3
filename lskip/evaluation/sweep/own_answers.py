"""What every exit says along answers that the model wrote itself, without decoding again."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lskip.evaluation.tasks.prompts import Prompt, texts_in_order
from lskip.inference import TextGenerator
from lskip.inference.exit_criteria import MeasuredExit
from lskip.inference.layers.kv_cache import PREFILL_ROWS
from lskip.inference.runners.base import ModelRunner
from lskip.losses import rows_at_once
from lskip.models.rounds import round_starts


class OwnText(NamedTuple):
    """A prompt and the model's greedy answer.

    Attributes:
        prompt, answer: token ids.
        max_new_tokens: the limit on the answer, near which rounds draft less.
        ends_drafts: whether a draft that comes to the answer's end stops there, as Batch has it.
    """

    prompt: list[int]
    answer: list[int]
    max_new_tokens: int
    ends_drafts: bool = False


class ExitReading(NamedTuple):
    """What the exits say for each of the N tokens of one answer, by layer.

    Attributes:
        hits: bool [L, N] on the CPU, whether the token is the exit's argmax.
        measured: [L, N] on the CPU, the value of an exit criterion; [L, 0] where none was asked for.
    """

    hits: Tensor
    measured: Tensor


def own_texts(generator: TextGenerator, prompts: Sequence[Prompt], batch_size: int) -> list[OwnText]:
    """Return the model's answers to prompts of one task."""
    most, answers = prompts[0].settings["max_new_tokens"], texts_in_order(generator, prompts, batch_size)
    ends = {*generator.eos_ids} if generator.runner.device.type == "cpu" else set()
    pairs = zip(prompts, answers, strict=True)
    return [OwnText(prompt.ids, answer, most, answer[-1] in ends) for prompt, answer in pairs]


@torch.inference_mode()
def read_answer(
    runner: ModelRunner,
    reading: Callable[[ModelRunner, int], ModelRunner],
    text: OwnText,
    vocab_size: int,
    criterion: type[MeasuredExit] | None = None,
) -> ExitReading:
    """Return what each exit says along an answer, from one pass.

    One pass suffices: up to its first wrong token, a drafting exit sees the model's own tokens alone, so what it says
    here is what it would draft.

    Args:
        runner: the model's own weights; or rounded ones, which here read keys and values of their own making, while in
            decoding those before the round are the model's.
        reading: (runner, layer) -> the runner that decodes the drafts of that exit, as Runners.reading_drafts.
    """
    ids = torch.tensor([text.prompt + text.answer[:-1]], device=runner.device)
    cache, first = runner.new_cache(1, ids.shape[1]), len(text.prompt) - 1
    answer, rows = torch.tensor(text.answer, device=runner.device), rows_at_once(vocab_size, runner.device)
    pieces = []
    for start in range(0, ids.shape[1], PREFILL_ROWS):
        x = runner.embed(ids[:, start : start + PREFILL_ROWS], [start])
        before = max(first - start, 0)  # rows of this piece that predict no token of the answer
        targets, layers = answer[max(start - first, 0) :], []
        for block in range(runner.num_layers):
            x = runner.run(x, cache, [start], block, block + 1)
            if x.shape[1] > before:
                layers.append(_read(reading(runner, block + 1), x[0, before:], targets, rows, criterion))
        pieces += [[torch.stack(parts) for parts in zip(*layers, strict=True)]] if layers else []
    return ExitReading(*(torch.cat(parts, 1).cpu() for parts in zip(*pieces, strict=True)))


def _read(
    runner: ModelRunner, states: Tensor, targets: Tensor, rows: int, criterion: type[MeasuredExit] | None
) -> tuple[Tensor, Tensor]:
    """Return hits [n] and measured [n] (or [0]) of an exit's states [n, D], `rows` of them at once."""
    hits, measured = [], []
    for part, wanted in zip(states.split(rows), targets[: len(states)].split(rows), strict=True):
        logits = runner.decode(part[None])[0]
        hits.append(logits.argmax(-1) == wanted)
        measured.append(logits.new_empty(0) if criterion is None else criterion.measure(logits))
    return torch.cat(hits), torch.cat(measured)


def own_tokens_per_round(readings: Sequence[ExitReading], num_speculations: int) -> list[float]:
    """Return, by layer, tokens per round of decoding these answers, the prefill a round, if it drafts so many."""
    hits = torch.cat([reading.hits for reading in readings], 1)
    rounds = round_starts(hits, first_of_answers(readings), num_speculations).sum(1)
    return (hits.shape[1] / rounds.double()).tolist()


def first_of_answers(readings: Sequence[ExitReading]) -> Tensor:
    """Return, bool [N], the first token of each answer, which the prefill brings and no exit drafts."""
    return torch.cat([torch.arange(reading.hits.shape[1]) == 0 for reading in readings])
