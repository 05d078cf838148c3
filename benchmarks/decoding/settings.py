"""Settings of the decoding benchmark (one a record), and the grid of them that the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lskip.inference.layers.quantized import DRAFT_WEIGHTS

METHODS = (
    "autoregressive",
    "control",  # autoregressive once more: how far two runs of one thing are apart
    "fixed_exit",
    "self_speculative",
    "hf_generate",
    "hf_early_exit",
    "hf_prompt_lookup",
    "hf_assistant",
    "llama_cpp",
)
BASES = ("autoregressive", "hf_generate")  # what ratios and texts are compared with: they always run
POLICIES = ("fixed", "confidence", "cost_aware")
LLAMA_CPP_PRECISIONS = ("float32", "bfloat16", "Q8_0")


OWN_WEIGHTS, ADAPTER = "own", "adapter"


class Source(NamedTuple):
    """The source of drafts in TextGenerator's options: `draft_weights` of its constructor, `draft` of its calls.

    OWN_WEIGHTS: the model's own, as if they were another's: verification runs every block again.
    ADAPTER: the model's own, and an exit adapter behind its first blocks.
    """

    draft_weights: str | None
    draft: str | None


DRAFTS = {
    "layers": Source(None, "layers"),
    # The same drafts, without the cached exit states: what that cache is worth (the paper: 6 to 12 %).
    "layers_uncached": Source(OWN_WEIGHTS, "weights"),
    **{name: Source(name, "weights") for name in DRAFT_WEIGHTS},
    "adapter": Source(ADAPTER, "adapter"),
    "ngram": Source(None, "ngram"),
    # Everything that the generator has: the cost-aware policy chooses.
    "any": Source(None, None),
    **{f"{name}+any": Source(name, None) for name in DRAFT_WEIGHTS},
}


@dataclass(frozen=True)
class Setting:
    """One row of the result: a method and everything that was set.

    Attributes:
        method: a name in METHODS.
        precision: of the weights that decide the text: "float32", "bfloat16", or llama.cpp's "Q8_0".
        exit_layer: blocks that draft, or at a fixed exit all that run.
        draft: what drafts: a name in DRAFTS, "assistant" (another model), None for nothing.
        policy: a name in POLICIES: how many tokens a round drafts.
        num_speculations: tokens that a round drafts, or at most.
        batch: texts decoded together.
    """

    method: str
    precision: str
    exit_layer: int | None = None
    draft: str | None = None
    policy: str | None = None
    num_speculations: int = 0
    batch: int = 1

    def __str__(self) -> str:
        parts = [self.method, self.precision, self.draft, self.policy]
        parts.append(f"E={self.exit_layer}" if self.exit_layer else None)
        parts.append(f"d={self.num_speculations}" if self.num_speculations else None)
        parts.append(f"batch {self.batch}" if self.batch > 1 else None)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Grid:
    """The swept values.

    Attributes:
        precision: of the model, in lskip and in transformers.
        methods, drafts, policies: names in METHODS, DRAFTS, POLICIES.
        exit_layers: E of early exits, and of the copies that serve as assistants.
        num_speculations: d of fixed drafts; other policies get the largest as their bound.
        assistant_given: the assistant is a model of its own, not a copy of the first E blocks.
    """

    precision: str
    methods: tuple[str, ...]
    drafts: tuple[str, ...]
    policies: tuple[str, ...]
    exit_layers: tuple[int, ...]
    num_speculations: tuple[int, ...]
    assistant_given: bool = False

    def settings(self) -> list[Setting]:
        """All settings, the bases first."""
        makers = {
            "control": lambda: [Setting("control", self.precision)],
            "fixed_exit": self._fixed_exit,
            "self_speculative": self._self_speculative,
            "hf_early_exit": lambda: self._drafted_by_transformers("hf_early_exit", "layers", self.exit_layers),
            "hf_prompt_lookup": lambda: self._lookup("hf_prompt_lookup", self.precision),
            "hf_assistant": self._assistant,
            "llama_cpp": self._llama_cpp,
        }
        settings = [Setting(method, self.precision) for method in BASES]
        for method in METHODS:
            if method in makers and method in self.methods:
                settings += makers[method]()
        return settings

    def _fixed_exit(self) -> list[Setting]:
        return [Setting("fixed_exit", self.precision, exit_layer) for exit_layer in self.exit_layers]

    def _self_speculative(self) -> list[Setting]:
        return [
            Setting("self_speculative", self.precision, exit_layer, draft, policy, count)
            for draft in self.drafts
            for exit_layer in (self.exit_layers if draft.startswith("layers") else (None,))
            for policy in self.policies
            if suits(policy, draft)
            for count in (self.num_speculations if policy == "fixed" else (max(self.num_speculations),))
        ]

    def _drafted_by_transformers(self, method: str, draft: str, exit_layers: tuple) -> list[Setting]:
        """transformers stops a draft at a confidence (its default), or not at all."""
        policies = [policy for policy in self.policies if policy != "cost_aware"] or ["confidence"]
        return [
            Setting(method, self.precision, exit_layer, draft, policy, count)
            for exit_layer in exit_layers
            for policy in policies
            for count in self.num_speculations
        ]

    def _assistant(self) -> list[Setting]:
        exit_layers = (None,) if self.assistant_given else self.exit_layers
        return self._drafted_by_transformers("hf_assistant", "assistant", exit_layers)

    def _lookup(self, method: str, precision: str) -> list[Setting]:
        return [Setting(method, precision, None, "ngram", "fixed", count) for count in self.num_speculations]

    def _llama_cpp(self) -> list[Setting]:
        settings = []
        for precision in LLAMA_CPP_PRECISIONS:
            settings += [Setting("llama_cpp", precision), *self._lookup("llama_cpp", precision)]
        return settings


def suits(policy: str, draft: str) -> bool:
    """Whether a policy can work with a draft: n-grams have no probabilities, and "any" must be chosen from."""
    if policy == "cost_aware":
        return True
    return not draft.endswith("any") and (policy == "fixed" or draft != "ngram")


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """A quarter, half and three quarters of the model."""
    exits = {min(max(round(num_layers * share), 1), num_layers - 1) for share in (0.25, 0.5, 0.75)}
    return tuple(sorted(exits - {0}))
