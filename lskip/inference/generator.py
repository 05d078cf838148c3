"""The object that users decode with: a model made ready for decoding, its tokenizer and its defaults."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING

from lskip.inference.auto_draft import with_auto_draft
from lskip.inference.decoding.batch import Batch, longest_draft
from lskip.inference.decoding.grammar_mask import GrammarMask, grammar_tokenizer
from lskip.inference.decoding.request import Request
from lskip.inference.decoding.sampling import TokenChooser
from lskip.inference.decoding.state_recorder import StateRecorder, check_states_at
from lskip.inference.drafting.cost_aware import CostAwareDraft
from lskip.inference.drafting.costs import Costs, measure_costs
from lskip.inference.drafting.costs_file import Learner, keep_costs
from lskip.inference.drafting.drafter import Runners
from lskip.inference.exit_criteria import bound
from lskip.inference.generation import Generation, TextStream
from lskip.inference.layers.lm_head import screened_head
from lskip.inference.model_defaults import read_defaults
from lskip.inference.runners.adapter_runner import AdapterRunner, check_made_for
from lskip.inference.runners.build import build_draft_runner, build_runner, resolve_draft_weights
from lskip.inference.runners.draft_head import DraftHead
from lskip.inference.settings import GenerationSettings
from lskip.inference.stopping import end_tokens, stop_rule
from lskip.inference.text import TextPieces, decode_text, encode_prompt
from lskip.models.decoder import Decoder
from lskip.models.encoding import longest_text
from lskip.models.exit_adapter import ExitAdapter
from lskip.utils.checks import check_whole
from lskip.utils.devices import trim_heap
from lskip.utils.user_paths import user_path

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lskip.models.exit_heads import TrainedExits


class TextGenerator:
    """A model made ready for decoding, for any number of prompts, one at a time or in batches.

    Attributes:
        model_defaults: defaults of the model's generation_config.
        runner: runs the model's blocks and head (FusedRunner or ModuleRunner).
        draft_runner, draft_weights: the same in rounded weights, which draft, and "int8" or "int4"; None: none.
        adapter_runner: the exit adapter that drafts behind `runner`'s first blocks, or None.
        draft_head: decodes drafts of layers and of weights to few tokens; None: to all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights: str = "auto",
        draft_weights: str | None = None,
        release_model: bool = False,
        bit_exact: bool | None = None,
        costs_file: str | None = None,
        exit_adapter: ExitAdapter | None = None,
        trained_exits: TrainedExits | None = None,
        batch_size: int = 1,
        draft_tokens: Sequence[int] | None = None,
    ):
        """Convert the weights, once.

        Args:
            model: a causal LM of a supported family, on its device and in its dtype. It is left as it is.
            tokenizer: None: prompts are token ids, and the text stays empty.
            weights: their layout: "plain"; "packed" or "halved" (for the CPU); "int8": rounded, so that the text is
                another one (x86); or "auto": by a rule what suits them and this machine, never rounded.
            draft_weights: "int8" or "int4": a rounded copy of the blocks drafts (all of them where no exit_layer is
                named); no training, CPU only. "auto": what suits model and machine. None: the model's first layers.
            release_model: free the model's blocks while converting. The model is of no use afterwards.
            bit_exact: a text's logits are the same bits alone, in any batch, with and without speculation, in bfloat16
                too. Costs 15 to 22 % of the speed. False: texts are equal in float32 up to ties within rounding. None:
                true for packed bfloat16 weights on a CPU (exact_by_default), else false.
            costs_file: JSON file that keeps `costs` and what a policy learnt, made where there is none; None: none.
            exit_adapter: drafts behind the model's first blocks; trained for this model, on its device. It is converted
                too (to int8 where that works), and left as it is.
            trained_exits: affine maps and the classifier of the model's exits.
            batch_size: texts that are probably decoded together, for which layouts are chosen. Any number can be.
            draft_tokens: ids of tokens that drafts of layers and of weights choose among, with end tokens; None: all.

        Raises:
            ValueError: an unsupported family, a value that is unknown or does not work here, another model's adapter.
        """
        check_whole("batch_size", batch_size, 1)
        decoder = Decoder(model)
        check_made_for(exit_adapter, decoder)
        self.tokenizer, self.costs_file = tokenizer, costs_file
        self.eos_ids = end_tokens(model, tokenizer)
        self.model_defaults = read_defaults(model.generation_config, self.eos_ids, decoder.device, decoder.vocab_size)
        self.num_layers, self.vocab_size = decoder.num_layers, decoder.vocab_size
        self.context_length = decoder.context_length
        # First, since building `runner` may take the model apart.
        screen = cache(partial(screened_head, decoder))
        self.draft_weights = resolve_draft_weights(draft_weights, weights, decoder, batch_size)
        self.draft_runner = None
        if self.draft_weights is not None:
            self.draft_runner = build_draft_runner(decoder, self.draft_weights, screen, batch_size)
        self.adapter_runner = None if exit_adapter is None else AdapterRunner(exit_adapter, batch_size)
        few = None if draft_tokens is None else {*draft_tokens, *self.eos_ids}
        self.draft_head = None if few is None else DraftHead(decoder, few, batch_size)
        lone_rows = batch_size == 1 and self.draft_runner is None and exit_adapter is None
        self.runner = build_runner(decoder, weights, release_model, lone_rows, bit_exact, screen)
        copied = deepcopy(trained_exits)
        self.trained_exits = None if copied is None else copied.to(self.runner.device, self.runner.dtype)
        trim_heap()  # give back what converting has freed, the model's own blocks among it

    def generate(self, prompt, **settings) -> Generation:
        """Continue a prompt and return the outcome.

        Args:
            prompt: a text, a list of chat messages, or token ids (list, or tensor of one row).
            settings: fields of GenerationSettings; what is not named comes from `defaults`.

        Raises:
            ValueError: a bad setting, an empty prompt, or one that leaves no room in the context.
        """
        return self.stream(prompt, **settings).run()

    def stream(self, prompt, **settings) -> TextStream:
        """Return the same as an iterable of text pieces. Everything is checked here, before the first piece."""
        chosen = self.settings(**settings)
        request = self.prepare(prompt, chosen)
        rounds = (news for _, news in self._rounds(deque([request]), 1, chosen))
        return TextStream(self.tokenizer, rounds, request.generation)

    def generate_batch(
        self,
        prompts: list,
        batch_size: int = 8,
        indices: list[int] | None = None,
        states_at: int | None = None,
        **settings,
    ) -> Iterator[tuple[int, Generation]]:
        """Continue many prompts, up to `batch_size` at a time: one that ends makes room for the next.

        Args:
            prompts: as in `generate`.
            batch_size: texts that are decoded together.
            indices: numbers of the prompts; None: 0, 1, 2 …
            states_at: blocks (1 … L) after which to keep the text's states, for Generation.states; None: keep none.
            settings: as in `generate`. With a seed, the prompt of index i gets seed + i.

        Returns:
            (index of the prompt, its outcome), as they end. Everything is checked before the first.

        Raises:
            ValueError: as in `generate`, with the prompt's index; or states are asked for where an adapter drafts or
                not all blocks run.
        """
        requests, chosen = self._prepare_all(prompts, batch_size, indices, settings)
        if states_at is not None:
            check_states_at(states_at, chosen, self.runners.available)
        return self._endings(requests, batch_size, chosen, states_at)

    def stream_batch(
        self, prompts: list, batch_size: int = 8, indices: list[int] | None = None, **settings
    ) -> Iterator[tuple[int, str]]:
        """Return the same as (index of the prompt, piece of its text), each final and never a part of a character."""
        if self.tokenizer is None:
            raise ValueError("prompt: streaming text needs a tokenizer, and the model came without one")
        requests, chosen = self._prepare_all(prompts, batch_size, indices, settings)
        return self._pieces(requests, batch_size, chosen)

    @property
    def runners(self) -> Runners:
        """All that runs blocks here: the model, and what may draft for it."""
        return Runners(self.runner, self.draft_runner, self.adapter_runner, self.trained_exits, self.draft_head)

    @property
    def defaults(self) -> GenerationSettings:
        """Settings of a call that names none, from the model's generation_config."""
        return self.model_defaults.settings

    def settings(self, **settings) -> GenerationSettings:
        """Return `defaults` with some settings changed, checked against this model.

        Raises:
            ValueError: an unknown name, or a value that is not allowed, in general or for this model.
        """
        chosen = self.model_defaults.changed(**settings)
        chosen.check_model(self.runners.available)
        chosen = with_auto_draft(chosen, lambda: self.auto_policy, self.draft_weights)
        for criterion in (chosen.exit_criterion, getattr(chosen.draft_policy, "criterion", None)):
            bound(criterion, self.trained_exits)
        if chosen.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings: need a tokenizer, and the model came without one")
        return chosen

    def prepare(self, prompt, settings: GenerationSettings, index: int = 0) -> Request:
        """Return the request of a prompt. `index`: its place in a batch, which its seed depends on."""
        ids = encode_prompt(prompt, self.tokenizer, settings.chat, self.vocab_size, self.most_characters)
        limits = settings.max_new_tokens, self.context_length
        stop = stop_rule(self.eos_ids, len(ids), *limits, settings.stop_strings, self.tokenizer)
        seed = secrets.randbits(32) if settings.seed is None else (settings.seed + index) % 2**64
        rules = self.model_defaults
        by_text = rules.by_text
        if (grammar := settings.grammar) is not None:
            by_text += (GrammarMask(self.grammar_tokenizer, grammar, len(ids)),)
        chooser = TokenChooser(settings, seed, self.eos_ids, ids, by_text, rules.warpers)
        return Request(ids, chooser, stop, Generation(prompt_tokens=len(ids), seed=seed), index=index)

    @cached_property
    def auto_policy(self) -> CostAwareDraft:
        """The policy of draft "auto" where none is named; it goes on learning over all texts."""
        return CostAwareDraft()

    @cached_property
    def grammar_tokenizer(self) -> LLTokenizer:
        """The tokenizer as grammars take it."""
        return grammar_tokenizer(self.tokenizer, self.vocab_size, self.eos_ids)

    @cached_property
    def most_characters(self) -> int | None:
        """Length of the longest prompt that the context can have room for; None without a tokenizer."""
        return None if self.tokenizer is None else longest_text(self.tokenizer, self.context_length)

    @cached_property
    def costs(self) -> Costs:
        """Times of this model's passes on this machine: from `costs_file`, or measured, which takes a few seconds."""
        adapter = None if self.adapter_runner is None else self.adapter_runner.runner
        path = None if self.costs_file is None else user_path(self.costs_file, "costs_file")
        measure = measure_costs if path is None else partial(keep_costs, path)
        return measure(self.runner, self.draft_runner, adapter_runner=adapter, draft_head=self.draft_head)

    def memory(self) -> dict[str, int]:
        """Return bytes by part: "blocks", "head", "embedding", and of what drafts "draft", "draft_head", "adapter"."""
        return self.runners.memory()

    def _prepare_all(
        self, prompts: list, batch_size: int, indices: list[int] | None, settings: dict
    ) -> tuple[deque[Request], GenerationSettings]:
        check_whole("batch_size", batch_size, 1)
        chosen = self.settings(**settings)
        requests: deque[Request] = deque()
        for index, prompt in zip(range(len(prompts)) if indices is None else indices, prompts, strict=True):
            try:
                requests.append(self.prepare(prompt, chosen, index))
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from error
        return requests, chosen

    def _rounds(
        self, requests: deque[Request], slots: int, settings: GenerationSettings, states_at: int | None = None
    ) -> Iterator[tuple[Request, list[int]]]:
        """Run round after round until all requests have ended, and yield the tokens that each round adds to each.

        Requests are taken out of the deque, so that one that has ended is freed, with all that sampling kept of it.
        """
        if not requests:
            return
        # A text's last token is never run, so it needs one cell less than it has tokens.
        cells = max(len(request.prompt) + request.stop.max_new_tokens - 1 for request in requests)
        slots = min(slots, len(requests))
        recorder = None
        if states_at is not None:  # room for the last token too, and for what is accepted beyond a text's end
            recorder = StateRecorder.for_slots(states_at, self.runner, slots, cells + 1 + longest_draft(settings))
        learner = Learner(self.costs_file, settings.draft_policy)
        learner.recall()
        batch = Batch(self.runners, settings, slots, cells, lambda: self.costs, recorder)
        while requests:
            batch.add(requests.popleft())
        try:
            while batch.busy:
                for news in batch.steps():
                    yield from news
        finally:
            learner.keep()

    def _endings(
        self, requests: deque[Request], batch_size: int, settings: GenerationSettings, states_at: int | None
    ) -> Iterator[tuple[int, Generation]]:
        for request, _ in self._rounds(requests, batch_size, settings, states_at):
            if request.ended:
                if self.tokenizer is not None:
                    request.generation.text = decode_text(self.tokenizer, request.generation.token_ids)
                yield request.index, request.generation

    def _pieces(
        self, requests: deque[Request], batch_size: int, settings: GenerationSettings
    ) -> Iterator[tuple[int, str]]:
        under_way: dict[Request, TextPieces] = {}
        for request, tokens in self._rounds(requests, batch_size, settings):
            pieces = under_way.setdefault(request, TextPieces(self.tokenizer))
            piece = pieces.push(tokens)
            if request.ended:
                piece += under_way.pop(request).rest()
            if piece:
                yield request.index, piece
