"""Settings of one generation, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from lskip.inference.drafting.drafter import Available
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.drafting.registry import DRAFTERS, check_draft, check_fixed_exit
from lskip.inference.exit_criteria import ExitCriterion
from lskip.inference.grammar import compile_grammar
from lskip.utils.checks import check_choice, check_parts, check_real, check_texts, check_unicode, check_whole

AUTO = "auto"  # as a draft: whatever pays of what is loaded
ACCEPTANCES = ("shared_noise", "rejection")
POLICY_METHODS = ("begin", "plan", "goes_on", "judge", "learn", "learnt", "recall", "summary")
CRITERION_METHODS = ("looks_at", "exits", "bound")


@dataclass(frozen=True)
class GenerationSettings:
    """Settings for continuing a prompt. These defaults are for what the checkpoint's generation_config leaves out.

    Attributes:
        max_new_tokens: tokens to generate at most; cut to what the context leaves.
        min_new_tokens: an end-of-text token is not chosen before this many, as in transformers.
        exit_layer: blocks that run before a token is predicted (1 … L). None: all of them.
        exit_criterion: decides token by token how deep to go, never deeper than exit_layer where that is named.
            Nothing is verified, so the text is another one. The prompt and the first token run all these blocks.
            None: every token does.
        num_speculations: tokens drafted before the whole model verifies them (at most, where a draft_policy decides).
            0 with an `exit_layer` below L generates from that layer alone: by the model's own norm and head or, where
            the generator has an exit adapter for that layer, through it.
        draft: what drafts: "layers" (blocks 1 … exit_layer of the model), "weights" (those, or all blocks where no
            exit_layer is named, in the generator's draft_weights), "ngram" (what followed the same tokens earlier in
            the text), "adapter" (blocks 1 … E and the generator's exit_adapter, made for E; with one, "layers" are no
            choice), or "auto" (a policy chooses among all of them, round by round: by default the generator's
            CostAwareDraft, and num_speculations that suit what is loaded). None: "adapter" where the generator has
            one, else "weights" where it has draft_weights, else "layers".
        draft_policy: decides round by round what drafts, and how many tokens. None: num_speculations every time.
        acceptance: which drafted tokens are kept when sampling. "shared_noise": draft and verification sample with
            the same noise, and a seed's text is the same with and without speculation. "rejection" (arXiv 2211.17192)
            keeps somewhat more; every token is still an exact draw from the model's distribution, but a seed's text
            depends on what was drafted.
        temperature: 0.0 takes the argmax, 1.0 samples from the model's distribution.
        top_k: sample among the k most probable tokens only; None: all.
        top_p: sample among the most probable that together reach this probability, in (0, 1].
        min_p: sample among those with at least this share of the highest probability, in [0, 1]; 0: all.
        repetition_penalty: above 1 makes tokens that are in the prompt or the text less likely, below 1 more, in
            greedy decoding too; 1: off.
        stop_strings: texts that end the generation, with the token that completes one; they need a tokenizer. Only
            generated text counts, special tokens included.
        json_schema: the text is JSON that follows this schema, and has no white space between its parts. Drafted or
            not, the text is the same. None: any text.
        regex: the text matches this regular expression from its beginning to its end. None: any text.
        logprobs: whether the outcome has the log probability of each token, by the model's own logits: before
            penalties, temperature and grammar.
        seed: fixes the sampled text; None: another text each time.
        chat: whether a text prompt goes through the tokenizer's chat template; None: when it has one, and
            training pairs did not go without it.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    exit_layer: int | None = None
    exit_criterion: ExitCriterion | None = None
    num_speculations: int = 0
    draft: str | None = None
    draft_policy: DraftPolicy | None = None
    acceptance: str = "shared_noise"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    logprobs: bool = False
    seed: int | None = None
    chat: bool | None = None

    def __post_init__(self):
        self._check_counts()
        # Logits divided by less overflow float32.
        check_real("temperature", self.temperature, "0, or from 1e-30 up", lambda value: value == 0 or value >= 1e-30)
        check_real("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        check_real("min_p", self.min_p, "from 0 to 1", lambda value: 0 <= value <= 1)
        check_real("repetition_penalty", self.repetition_penalty, "above 0", lambda value: value > 0)
        if self.draft is not None:
            check_choice("draft", self.draft, (AUTO, *DRAFTERS))
        check_choice("acceptance", self.acceptance, ACCEPTANCES)
        check_parts("draft_policy", self.draft_policy, POLICY_METHODS, "a DraftPolicy, such as CostAwareDraft()")
        check_parts("exit_criterion", self.exit_criterion, CRITERION_METHODS, "an ExitCriterion, such as Margin(0.5)")
        if self.exit_criterion is not None and self.num_speculations:
            raise ValueError(
                f"num_speculations: {self.num_speculations} does not go with an exit_criterion, whose tokens are not"
                " verified; use 0, or leave the criterion out"
            )
        self._check_auto()
        check_texts("stop_strings", self.stop_strings)
        for stop_string in self.stop_strings:
            check_unicode("stop_strings", stop_string)
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        if self.grammar is not None and self.min_new_tokens:
            raise ValueError("min_new_tokens: does not go with json_schema or regex, which say where a text may end")
        if self.logprobs not in (True, False):
            raise ValueError(f"logprobs: {self.logprobs!r} is not true or false")
        if self.chat not in (None, True, False):
            raise ValueError(f"chat: {self.chat!r} is not true, false or null")

    @property
    def grammar(self) -> str | None:
        """What json_schema or regex ask for, as llguidance takes it; None: neither is given."""
        return compile_grammar(self.json_schema, self.regex)

    def _check_auto(self) -> None:
        if self.draft != AUTO:
            return
        if self.exit_criterion is not None:
            raise ValueError("draft: 'auto' does not go with an exit_criterion, whose tokens are not verified")
        if not getattr(self.draft_policy, "chooses_draft", True):
            name = type(self.draft_policy).__name__
            raise ValueError(f"draft: 'auto' needs a policy that chooses among drafts, which {name} does not")

    def _check_counts(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        check_whole("num_speculations", self.num_speculations, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens, {self.max_new_tokens}"
            )
        for name, lowest in (("exit_layer", 1), ("top_k", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), lowest)
        if self.seed is not None and self.seed >= 2**64:
            raise ValueError(f"seed: {self.seed} is not below 2**64")

    def check_model(self, available: Available) -> None:
        """Check exit_layer, exit_criterion and draft against a model.

        Raises:
            ValueError: exit_layer beyond the model, a criterion that would never be asked, or a draft that lacks what
                it needs: draft weights, an adapter of this exit, an exit below the last.
        """
        num_layers = available.num_layers
        if self.exit_layer is not None and self.exit_layer > num_layers:
            raise ValueError(
                f"exit_layer: {self.exit_layer} is not a whole number from 1 to {num_layers}, the model's layers"
            )
        depth = self.exit_layer or num_layers
        if self.exit_criterion is not None and not any(map(self.exit_criterion.looks_at, range(1, depth))):
            raise ValueError(f"exit_criterion: looks at no layer below {depth}, the last one that runs")
        if self.draft is not None or self.num_speculations:
            chosen_later = self.draft == AUTO or getattr(self.draft_policy, "chooses_draft", False)
            kind = None if self.draft == AUTO else self.draft
            check_draft(kind, self.exit_layer, self.num_speculations, available, chosen_later)
        if self.exits_by_adapter(available):
            check_fixed_exit(self.exit_layer, available)

    def exits_by_adapter(self, available: Available) -> bool:
        """Return whether a text leaves the model for good through the exit adapter."""
        fixed = not self.num_speculations and self.exit_criterion is None
        return fixed and self.exit_layer is not None and self.exit_layer == available.adapter_exit

    def full_depth(self, num_layers: int) -> int:
        """Return the number of blocks that decide a token: all, or at a fixed exit its own."""
        return num_layers if self.num_speculations else self.exit_layer or num_layers

    def changed(self, **settings) -> GenerationSettings:
        """Return a copy with some settings changed.

        Raises:
            ValueError: an unknown name, or a value that is not allowed.
        """
        known = [field.name for field in fields(self)]
        for name in settings:
            if name not in known:
                raise ValueError(f"{name}: no such generation setting; there are {', '.join(known)}")
        return replace(self, **settings)
