"""Text in, text out: one object that holds a model ready for decoding."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.decoder import Decoder
from lskip.inference.engine import PREFILL_ROWS, Depth, Round, Step, decode_round, prefill
from lskip.inference.lean_step import LeanStep, obstacle, sample_weights
from lskip.inference.module_step import ModuleStep
from lskip.inference.quantized import HEAD_FORM, choose_draft_form
from lskip.inference.sampling import TokenChooser
from lskip.inference.settings import GenerationSettings, defaults_from
from lskip.inference.stopping import StopRule, stop_rule
from lskip.inference.text import TextPieces, decode_text, encode_prompt
from lskip.inference.weights import STEPS_AND_VERIFICATION, VERIFICATION, Mix, Plain, choose_form


@dataclass
class Generation:
    """What one prompt brought.

    Attributes:
        text: the continuation, special tokens left out ("" without a tokenizer).
        token_ids: its tokens, an end-of-text token included.
        prompt_tokens: tokens of the prompt, chat template included.
        seconds: from the prompt's tokens to the last token; the prompt's own pass is part of it.
        finish_reason: "eos", "length" (max_new_tokens reached), "context" (no position left), or None while it runs
            or where the caller stopped it.
        drafted: tokens drafted. accepted: of these, how many are in the text.
        rounds: passes of the whole model (of the exit, at a fixed exit), the one that takes the prompt included.
        accepted_counts: accepted tokens of a drafting round -> how many rounds had that many.
        seed: fixes the sampled text; the one drawn when none was asked for.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    seconds: float = 0.0
    finish_reason: str | None = None
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    accepted_counts: Counter[int] = field(default_factory=Counter)
    seed: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float:
        """Emitted tokens per verification."""
        return len(self.token_ids) / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    def add(self, outcome: Round, kept: list[int]) -> None:
        """Counts a round of which `kept` tokens belong to the text: what follows a stop is accepted by nobody."""
        accepted = min(outcome.accepted, len(kept))
        self.token_ids += kept
        self.rounds += 1
        self.drafted += outcome.drafted
        self.accepted += accepted
        if outcome.drafted:
            self.accepted_counts[accepted] += 1


class TextStream:
    """A generation under way: iterate for pieces of text, each final and never a part of a character.

    `generation` holds what there is so far, complete once the iteration has ended. Leaving early (a break, or
    ctrl-C) is fine.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, rounds: Iterator[list[int]], generation: Generation):
        self._tokenizer, self._rounds, self._generation = tokenizer, rounds, generation

    def __iter__(self) -> Iterator[str]:
        if self._tokenizer is None:
            raise ValueError("prompt: streaming text needs a tokenizer, and the model came without one")
        pieces = TextPieces(self._tokenizer)
        for tokens in self._rounds:
            if piece := pieces.push(tokens):
                yield piece
        if piece := pieces.rest():
            yield piece

    def run(self) -> Generation:
        """Generates to the end."""
        for _ in self._rounds:
            pass
        return self.generation

    @property
    def generation(self) -> Generation:
        """The outcome so far."""
        if self._tokenizer is not None:
            self._generation.text = decode_text(self._tokenizer, self._generation.token_ids)
        return self._generation


class TextGenerator:
    """A model made ready for decoding; use it for any number of prompts, one at a time.

    Attributes:
        defaults: settings of a call that names none, from the model's generation_config.
        step: how blocks are run (LeanStep or ModuleStep).
        draft_step: the blocks that draft when they have weights of their own; None: `step` drafts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights: str = "auto",
        draft_weights: str | None = None,
        release_model: bool = False,
    ):
        """Converts the weights once.

        Args:
            model: a causal LM of a supported family, on its device and in its dtype. It is left as it is.
            tokenizer: None: prompts are token ids, and the text stays empty.
            weights: how they are held: "plain", "packed" or "transposed" (both for the CPU), or "auto": what is
                fastest on this machine.
            draft_weights: "int8" or "int4": drafts come from a rounded copy of the blocks (of all of them where no
                exit_layer is named) and are verified by the model's own weights, so that the text is the same.
                Needs no training; CPU only. None: drafts come from the model's own first layers.
            release_model: free the model's blocks while converting. The model is of no use afterwards.

        Raises:
            ValueError: an unsupported family, or `weights` or `draft_weights` that are unknown or do not work here.
        """
        decoder = Decoder(model)
        self.tokenizer = tokenizer
        self.defaults = defaults_from(model.generation_config)
        self.eos_ids = end_tokens(model, tokenizer)
        self.num_layers, self.vocab_size = decoder.num_layers, decoder.vocab_size
        self.context_length = decoder.context_length
        # First, since building `step` may take the model apart.
        self.draft_step = None if draft_weights is None else build_draft_step(decoder, draft_weights)
        mix = STEPS_AND_VERIFICATION if draft_weights is None else VERIFICATION
        self.step = build_step(decoder, weights, release_model, mix)

    def generate(self, prompt, **settings) -> Generation:
        """Continues a prompt.

        Args:
            prompt: a text, a list of chat messages, or token ids (list, or tensor of one row).
            settings: fields of GenerationSettings; what is not named comes from `defaults`.

        Raises:
            ValueError: a bad setting, an empty prompt, or one that leaves no room in the context.
        """
        return self.stream(prompt, **settings).run()

    def stream(self, prompt, **settings) -> TextStream:
        """The same as an iterator of text pieces. Everything is checked here, before the first piece."""
        chosen = self.defaults.changed(**settings)
        chosen.check_layers(self.num_layers, draft_weights=self.draft_step is not None)
        ids = encode_prompt(prompt, self.tokenizer, chosen.chat, self.vocab_size)
        stop = stop_rule(self.eos_ids, len(ids), chosen.max_new_tokens, self.context_length)
        seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
        generation = Generation(prompt_tokens=len(ids), seed=seed)
        return TextStream(self.tokenizer, self._rounds(ids, chosen, stop, generation), generation)

    def _rounds(
        self, ids: list[int], settings: GenerationSettings, stop: StopRule, generation: Generation
    ) -> Iterator[list[int]]:
        """Runs round after round until the text stops; yields the tokens that each one adds."""
        begin = time.perf_counter()
        depth = depth_of(settings, self.num_layers)
        choose = TokenChooser(settings, generation.seed, self.eos_ids, len(ids) + settings.min_new_tokens)
        draft_step = self.draft_step if settings.num_speculations else None
        with torch.inference_mode():
            # Other weights draft from the prompt's last token on: what comes before, the model itself has seen.
            pending = PREFILL_ROWS if draft_step is None else 1
            sequence = prefill(self.step, ids, stop.max_new_tokens, depth.full, pending)
        while generation.finish_reason is None:
            left = stop.max_new_tokens - len(generation.token_ids)
            # A generator must not hold inference mode while the caller runs.
            with torch.inference_mode():
                num_drafts = min(settings.num_speculations, left - 1)
                outcome = decode_round(self.step, sequence, depth, num_drafts, choose, draft_step)
            kept, generation.finish_reason = stop.cut(outcome.tokens, len(generation.token_ids))
            generation.add(outcome, kept)
            generation.seconds = time.perf_counter() - begin
            yield kept


def depth_of(settings: GenerationSettings, num_layers: int) -> Depth:
    """Autoregressive: (L, L). Fixed exit: (E, E). Self-speculative: (E, L)."""
    exit_layer = settings.exit_layer or num_layers
    return Depth(exit_layer, num_layers if settings.num_speculations else exit_layer)


def build_step(decoder: Decoder, weights: str, release: bool, mix: Mix) -> Step:
    """LeanStep where it covers the model, else the model's own modules.

    Raises:
        ValueError: `weights` is unknown, does not work here, or asks for a form that the modules do not have.
    """
    reason = obstacle(decoder)
    if reason is None:
        return LeanStep(decoder, choose_form(weights, sample_weights(decoder), mix), release)
    if choose_form(weights, [decoder.head_weight.detach()]) is not Plain and weights != "auto":
        raise ValueError(f"weights: {weights!r} is not for this model ({reason}); use 'auto' or 'plain'")
    return ModuleStep(decoder)


def build_draft_step(decoder: Decoder, draft_weights: str) -> LeanStep:
    """The blocks again, in rounded weights.

    Raises:
        ValueError: `draft_weights` is unknown or does not work here, or the lean step does not cover the model.
    """
    if (reason := obstacle(decoder)) is not None:
        raise ValueError(f"draft_weights: {draft_weights!r} is not for this model ({reason}); leave it out")
    return LeanStep(decoder, choose_draft_form(draft_weights, sample_weights(decoder)), head_form=HEAD_FORM)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Tokens that end a text: generation_config's, else the tokenizer's, else none."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def load_generator(
    model: str = "smollm2",
    dtype: str = "float32",
    weights: str = "auto",
    draft_weights: str | None = None,
    device: str = "auto",
) -> TextGenerator:
    """A generator from whatever `--model` can name: "smollm2", a run, a checkpoint, a folder, a hub name, a GGUF file.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        weights, draft_weights: as in TextGenerator.
        device: "cpu", "cuda", …; "auto": a GPU where there is one.

    Raises:
        ValueError, FileNotFoundError: what is wrong with an argument, or that there is no such model.
    """
    from lskip.pretrained import load_model  # brings the GGUF reader and the hub client: only when loading

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: {dtype!r} is not one of float32, bfloat16, float16")
    place = resolve_device(device)
    loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
    return TextGenerator(loaded.eval().to(place), tokenizer, weights, draft_weights, release_model=True)


def resolve_device(device: str) -> torch.device:
    """ValueError unless torch knows the device and this machine has it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {device!r} cannot be used here; try 'auto' or 'cpu'") from error
    return torch.device(device)
