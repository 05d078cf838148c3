"""Choice of tokens from logits: greedy, or sampled with noise that draft and verification share."""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lskip.inference.decoding.engine import keep_agreeing
from lskip.inference.decoding.noise import gumbel_noise
from lskip.inference.settings import GenerationSettings
from lskip.utils.devices import to_device


class TokenChooser:
    """Choice of one text's tokens.

    Sampling is argmax(processed logits + Gumbel noise), the noise a function of (seed, position) alone: an exact
    draw from the processed distribution. Draft and verification see the same noise. So a drafted token is accepted
    where it equals the model's own choice, and the text does not depend on whether, or how, it was drafted.

    Nothing here waits for the logits' device.

    Attributes:
        text: tokens of the prompt and the answer so far; its owner extends it after each round.
        rejection: whether drafted tokens are to be verified by rejection sampling (RejectionChooser).
        logprobs: whether the log probabilities of its tokens are asked for.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        seed: int,
        eos_ids: tuple[int, ...],
        prompt: list[int],
        by_text: tuple[LogitsProcessor, ...] = (),
        more_warpers: tuple[LogitsProcessor, ...] = (),
    ):
        """Prepare for the text behind `prompt`.

        Args:
            eos_ids: banned from the first `settings.min_new_tokens` positions after the prompt.
            by_text: further logits processors that depend on the text before a token.
            more_warpers: further logits processors of sampling.
        """
        self.text, self.seed, self.eos_ids = list(prompt), seed, tuple(eos_ids)
        self.first_eos = len(prompt) + settings.min_new_tokens
        self.greedy, self.logprobs = settings.temperature == 0, settings.logprobs
        self.rejection = settings.acceptance == "rejection" and not self.greedy
        self.by_text = LogitsProcessorList(by_text)
        if settings.repetition_penalty != 1:
            self.by_text.insert(0, RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
        self.warpers = LogitsProcessorList([] if self.greedy else [*warpers(settings), *more_warpers])
        self._text_ids: Tensor | None = None
        self._noise: dict[int, Tensor] = {}

    @property
    def takes_argmax(self) -> bool:
        """Whether `sample` is the argmax of logits after `ban`."""
        return self.greedy and not self.by_text

    def ban(self, logits: Tensor, drafted: Tensor) -> None:
        """Ban, in place, the end tokens where the text is too short for one. Arguments as in `sample`."""
        if (rows := self.first_eos - self._first_position(logits, drafted)) > 0:
            for token in self.eos_ids:
                logits[:rows, token] = float("-inf")

    def sample(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Return token ids [n] for n consecutive positions.

        Args:
            logits: [n, V]; row j is for the token at position len(text) + m - (n - 1) + j.
            drafted: [m], m >= n - 1: tokens after the text; row j stands after the first m - (n - 1) + j of them.
        """
        scores = self.scores(logits, drafted)
        if not self.greedy:
            scores = scores + self.noise(self._first_position(logits, drafted), scores)
        return scores.argmax(-1)

    def verify(self, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of kept tokens [1] and the token after them [1], from logits [d+1, V] and drafted [d]."""
        return keep_agreeing(self.sample(logits, drafted)[None], drafted[None])

    def scores(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Return the processed logits, float32 [n, V], in the order of transformers' generate; see `sample`."""
        first, scores = self._first_position(logits, drafted), logits.float()
        if self.by_text:
            before = torch.cat([self._text_on(drafted.device), drafted])[None]
            rows = [self.by_text(before[:, : first + row], scores[row : row + 1]) for row in range(len(scores))]
            scores = torch.cat(rows)
        if self.eos_ids and first < self.first_eos:
            scores = scores.clone()
            self.ban(scores, drafted)
        return self.warpers(None, scores)

    def noise(self, first: int, like: Tensor) -> Tensor:
        """Return Gumbel noise of `like`'s shape [n, V] for the tokens from position `first` on."""
        for position in [position for position in self._noise if position < len(self.text)]:
            del self._noise[position]
        num, size = like.shape
        for position in range(first, first + num):
            if position not in self._noise:  # verification uses the draft's noise again
                self._noise[position] = to_device(gumbel_noise(self.seed, position, size), like.device)
        return torch.stack([self._noise[position] for position in range(first, first + num)])

    def _first_position(self, logits: Tensor, drafted: Tensor) -> int:
        return len(self.text) + drafted.shape[-1] - (logits.shape[-2] - 1)

    def _text_on(self, device: torch.device) -> Tensor:
        """Return the text's ids on the device, of which only the new ones are copied."""
        known = self._text_ids
        if known is None:
            known = torch.empty(0, dtype=torch.long, device=device)
        if new := self.text[len(known) :]:
            known = torch.cat([known, to_device(torch.tensor(new), device)])
        self._text_ids = known
        return known


def warpers(settings: GenerationSettings) -> list:
    """Return the logits processors of sampling, in the order of transformers' `_get_logits_processor`."""
    chosen = []
    if settings.temperature != 1:
        chosen.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k is not None:
        chosen.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        chosen.append(TopPLogitsWarper(float(settings.top_p)))
    if settings.min_p > 0:
        chosen.append(MinPLogitsWarper(float(settings.min_p)))
    return chosen
