"""The base class of all drafters. A new kind is a class in a file of its own, registered under its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import Draft
from lskip.inference.drafting.round import Chooser, Drafted, Observer, Slots
from lskip.inference.runners.adapter_runner import AdapterRunner
from lskip.inference.runners.base import ModelRunner
from lskip.inference.runners.draft_head import DraftHead, DraftHeadRunner
from lskip.inference.runners.exit_head_runner import read_at

if TYPE_CHECKING:
    from lskip.models.exit_heads import TrainedExits

# Asked after each drafted token: (function that returns its logits [A, 1, V], token ids [A], the exit's states
# [A, 1, D]) -> False ends the draft.
GoesOn = Callable[[Callable[[], Tensor], Tensor, Tensor], bool]


class Available(NamedTuple):
    """Parts of a loaded model that may draft.

    Attributes:
        num_layers: L.
        draft_weights: whether there is a copy in rounded weights.
        adapter_exit: exit layer of its exit adapter; None: it has none.
        adapter_joins: whether that takes the last layer's state of the token before.
    """

    num_layers: int
    draft_weights: bool = False
    adapter_exit: int | None = None
    adapter_joins: bool = False

    def has(self, option: str | None) -> bool:
        """Return whether the model was loaded with a Drafter's `needs`."""
        loaded = {None: True, "draft_weights": self.draft_weights, "exit_adapter": self.adapter_exit is not None}
        return loaded[option]


@dataclass(frozen=True)
class Runners:
    """All that a generator has loaded.

    Attributes:
        model: the model's own blocks and head.
        draft: the same in rounded weights, or None.
        adapter: the model's exit adapter, or None.
        exits: affine maps and the classifier of the model's exits, or None.
        draft_head: decodes drafts of `model`'s and `draft`'s blocks to few tokens; None: their own heads do, to all.
    """

    model: ModelRunner
    draft: ModelRunner | None = None
    adapter: AdapterRunner | None = None
    exits: TrainedExits | None = None
    draft_head: DraftHead | None = None

    def reading_drafts(self, runner: ModelRunner, exit_layer: int) -> ModelRunner:
        """Return `runner`, `model` or `draft`, as the drafts of `exit_layer` are to be decoded."""
        runner = runner if self.draft_head is None else DraftHeadRunner(runner, self.draft_head)
        return read_at(runner, self.exits, exit_layer)

    def memory(self) -> dict[str, int]:
        """Return bytes by part, as TextGenerator.memory says."""
        parts = self.model.memory()
        if self.draft is not None:
            draft = self.draft.memory()
            shared = self.draft.head is getattr(self.model, "screen", None)
            parts["draft"] = draft["blocks"] + (0 if shared else draft["head"])
        for name, part in (("draft_head", self.draft_head), ("adapter", self.adapter)):
            if part is not None:
                parts[name] = part.nbytes
        return parts

    @property
    def available(self) -> Available:
        """Parts that may draft."""
        has_draft = self.draft is not None
        if self.adapter is None:
            return Available(self.model.num_layers, has_draft)
        shape = self.adapter.shape
        return Available(self.model.num_layers, has_draft, shape.exit_layer, shape.joins_last_state)


class Drafter(ABC):
    """A source of drafted tokens for the texts of one batch. Verification keeps the text the model's own.

    Attributes:
        kind: its name for `--draft`.
        needs: the loading option without which it cannot draft (draft_weights, exit_adapter); None: nothing.
        takes_exit: whether exit_layer says how many blocks draft.
        leaves_states: whether verification goes on from the states after its exit_layer.
        reads_exit: whether its tokens are what the model's states after exit_layer say, read by norm and head: then
            verification's own states tell what it would have drafted.
        resembles: kind of which a draft of the same exit_layer is accepted about as often; None: there is none.
        foresees: whether `foresee` tells what it would draft, without a pass.
        observer: sees the states of all tokens that the texts keep, and where texts begin and move; None: there is
            none.
    """

    kind: ClassVar[str]
    needs: ClassVar[str | None] = None
    takes_exit: ClassVar[bool] = False
    leaves_states: ClassVar[bool] = False
    reads_exit: ClassVar[bool] = False
    resembles: ClassVar[str | None] = None
    foresees: ClassVar[bool] = False
    observer: Observer | None = None

    def __init__(self, runners: Runners, slots: Slots):
        """Prepare for the texts of `slots`, of which there are none yet."""
        self.runners, self.slots = runners, slots

    @classmethod
    def check(cls, available: Available, exit_layer: int | None, count: int) -> None:
        """Refuse settings, or a model, that it cannot draft with.

        Args:
            available: parts of the model that may draft.
            exit_layer: as in GenerationSettings.
            count: tokens that a round drafts at most; 0: nothing drafts.

        Raises:
            ValueError: one sentence that names the setting.
        """
        if not available.has(cls.needs):
            raise ValueError(f"draft: {cls.kind!r} needs {cls.needs}, and the generator has none")

    @classmethod
    def drafts(cls, available: Available, exit_layer: int | None) -> list[Draft]:
        """Return the drafts that `exit_layer` (None: any) and the model allow, the one to prefer first."""
        return [Draft(cls.kind, 0)] if available.has(cls.needs) else []

    @classmethod
    def seconds(cls, draft: Draft, count: int, slots: int, costs: Costs) -> float:
        """Return the seconds of drafting `count` tokens in each of `slots`, verification left out."""
        return 0.0

    @abstractmethod
    def propose(self, draft: Draft, count: int, chooser: Chooser, goes_on: GoesOn) -> Drafted | None:
        """Return up to `count` tokens behind each text; None: it has none in this round.

        Args:
            draft: one of `drafts`.
            chooser: chooses tokens from logits, for drafters that compute logits; cuts the guesses of those that
                do not (`possible`).
            goes_on: to be asked after each token but the last, by drafters that make one token after another.
        """

    def foresee(self, count: int) -> list[list[int]]:
        """Return up to `count` tokens that it would draft now in each slot, fewer or none where it has none.

        They are still to be cut by the chooser's `possible`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not foresee")

    def begin(self, slot: int) -> None:
        """Forget the last text of `slot`, where a new one begins."""
        return

    def move(self, source: int, target: int) -> None:
        """Move the record of the text in slot `source` to slot `target`, whose text has ended."""
        return
