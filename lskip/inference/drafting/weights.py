"""Drafts of the model's own blocks in rounded weights: no training, no second model."""

from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import Draft
from lskip.inference.drafting.drafter import Available, Drafter, GoesOn
from lskip.inference.drafting.layers import draft_tokens, usual_exits
from lskip.inference.drafting.round import Chooser, Drafted


class WeightsDrafter(Drafter):
    """Drafter of a copy of the blocks in 8 or 4 bits: all of them, or those up to exit_layer."""

    kind = "weights"
    needs = "draft_weights"
    takes_exit = True
    resembles = "layers"

    @classmethod
    def drafts(cls, available: Available, exit_layer: int | None) -> list[Draft]:
        if not available.draft_weights:
            return []
        layers = available.num_layers
        # Beside an adapter no probe reads exits, and to try them all takes longer than most texts.
        exits = usual_exits(layers) if available.adapter_exit is None else []
        return [Draft(cls.kind, each) for each in ([exit_layer] if exit_layer else [layers, *exits])]

    @classmethod
    def seconds(cls, draft: Draft, count: int, slots: int, costs: Costs) -> float:
        if costs.draft is None:
            raise ValueError("costs: hold no times for draft weights; measure them with the draft weights loaded")
        return count * costs.draft.draft_seconds(draft.exit_layer, slots)

    def propose(self, draft: Draft, count: int, chooser: Chooser, goes_on: GoesOn) -> Drafted:
        runner = self.runners.reading_drafts(self.runners.draft, draft.exit_layer)
        drafted = draft_tokens(runner, self.slots, draft.exit_layer, count, chooser, goes_on)
        # Its states are not the model's own, so verification starts at the first block. Both share the cache: drafts
        # attend to the model's own keys and values, and verification writes over the draft's.
        return Drafted(drafted.ids)
