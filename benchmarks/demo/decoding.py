"""Held-out requests decoded in every way, turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.decoding.settings import Setting
from benchmarks.decoding.transformers_peer import drafting_as
from benchmarks.demo.report import acceptance, console
from benchmarks.demo.sizes import Sizes
from lskip.evaluation.tasks.prompts import Prompt
from lskip.inference import Generation, TextGenerator

Way = Callable[[Prompt], Any]  # decodes one request


class Timed(NamedTuple):
    """One way to decode: what came of each request, and the median of its seconds over all turns."""

    outcomes: list[Any]
    seconds: list[float]

    def over(self, other: Timed) -> float:
        """How many times as fast as another way, over all requests together."""
        return sum(other.seconds) / sum(self.seconds)


def time_in_turns(ways: dict[str, Way], prompts: Sequence[Prompt], turns: int) -> dict[str, Timed]:
    """Decode each prompt in each way, `turns` times; who goes first changes. The first prompt warms up."""
    for way in ways.values():
        way(prompts[0])
    names = list(ways)
    outcomes = {name: [] for name in names}
    seconds = {name: [] for name in names}
    for number, prompt in enumerate(prompts):
        taken = {name: [] for name in names}
        for turn in range(turns):
            first = (number + turn) % len(names)
            for name in names[first:] + names[:first]:
                began = time.perf_counter()
                outcome = ways[name](prompt)
                taken[name].append(time.perf_counter() - began)
                if turn == 0:
                    outcomes[name].append(outcome)
        for name in names:
            seconds[name].append(statistics.median(taken[name]))
    return {name: Timed(outcomes[name], seconds[name]) for name in names}


def own_way(generator: TextGenerator, **settings) -> Way:
    return lambda prompt: generator.generate(prompt.ids, **prompt.settings, **settings)


def transformers_way(model: PreTrainedModel, cell: Setting | None = None) -> Way:
    """transformers' greedy `generate`, by `assistant_early_exit` with the settings of a cell."""
    drafting = {} if cell is None else {"assistant_early_exit": cell.exit_layer}

    @torch.inference_mode()
    def decode(prompt: Prompt) -> list[int]:
        ids = torch.tensor([prompt.ids])
        length = {"max_new_tokens": prompt.settings["max_new_tokens"], "pad_token_id": 0}
        with drafting_as(None if cell is None else model.generation_config, cell):
            output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length, **drafting)
        return output[0, len(prompt.ids) :].tolist()

    return decode


def best_early_exit(model: PreTrainedModel, prompts: Sequence[Prompt], sizes: Sizes) -> Setting:
    """The fastest cell of `assistant_early_exit`: exit, length, and with or without its threshold of confidence."""
    cells = {
        str(cell): cell
        for exit_layer in sizes.hf_exits
        for length in sizes.hf_lengths
        for policy in ("fixed", "confidence")
        for cell in [Setting("hf_early_exit", "float32", exit_layer, None, policy, length)]
        if exit_layer < model.config.num_hidden_layers
    }
    timed = time_in_turns({name: transformers_way(model, cell) for name, cell in cells.items()}, prompts, turns=1)
    return cells[min(timed, key=lambda name: sum(timed[name].seconds))]


class Found(NamedTuple):
    """Outcomes of every way, and the settings that lskip found for drafting."""

    timed: dict[str, Timed]
    settings: dict[str, Any]
    early_exit: Setting

    @property
    def drafted(self) -> list[Generation]:
        return self.timed["self-speculation"].outcomes

    def tokens_per_second(self, name: str) -> float:
        timed = self.timed[name]
        return sum(len(outcome.token_ids) for outcome in timed.outcomes) / sum(timed.seconds)

    def summary(self) -> dict[str, Any]:
        """What decoding adds to summary.json: texts compared, and ratios of seconds, prompts included."""
        plain, drafted, reference = (self.timed[name] for name in ("autoregressive", "self-speculation", "generate"))
        texts = [outcome.token_ids for outcome in plain.outcomes]
        return {
            **self.settings,
            "requests": len(texts),
            "mismatches": sum(text != outcome.token_ids for text, outcome in zip(texts, self.drafted, strict=True)),
            "mismatches_with_generate": sum(a != b for a, b in zip(texts, reference.outcomes, strict=True)),
            **acceptance(self.drafted),
            "speedup": drafted.over(plain),
            "control": self.timed["autoregressive again"].over(plain),
            "speedup_over_generate": drafted.over(reference),
            "speedup_over_assistant_early_exit": drafted.over(self.timed["assistant_early_exit"]),
            "assistant_early_exit": {
                "exit_layer": self.early_exit.exit_layer,
                "num_speculations": self.early_exit.num_speculations,
                "policy": self.early_exit.policy,
            },
            "tokens_per_second": self.tokens_per_second("self-speculation"),
            "tokens_per_second_autoregressive": self.tokens_per_second("autoregressive"),
        }


def compare_decoding(
    ours: tuple[PreTrainedModel, TextGenerator],
    drafts: tuple[TextGenerator, dict[str, Any]],
    small: TextGenerator,
    requests: Sequence[Prompt],
    sizes: Sizes,
) -> Found:
    """Decode requests by lskip (also twice without drafts: the control), by transformers, and by the small model."""
    (model, generator), (drafting, settings) = ours, drafts
    early_exit = best_early_exit(model, requests[: sizes.hf_requests], sizes)
    console.print(f"{len(requests)} held-out requests in turns; transformers' best: {early_exit}")
    ways = {
        "autoregressive": own_way(generator),
        "autoregressive again": own_way(generator),
        "self-speculation": own_way(drafting, **settings),
        "generate": transformers_way(model),
        "assistant_early_exit": transformers_way(model, early_exit),
        "small": own_way(small),
    }
    return Found(time_in_turns(ways, requests, sizes.turns), settings, early_exit)
