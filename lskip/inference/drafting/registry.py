"""The registry of drafters by kind, and the seconds of a round with one of them."""

from inspect import isabstract

from lskip.inference.drafting.adapter import AdapterDrafter
from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import Draft, DraftPlan
from lskip.inference.drafting.drafter import Available, Drafter
from lskip.inference.drafting.layers import LayersDrafter
from lskip.inference.drafting.ngram import NgramDrafter
from lskip.inference.drafting.weights import WeightsDrafter
from lskip.inference.layers.quantized import DRAFT_WEIGHTS

# In the order in which a generator prefers them where nothing is named.
DRAFTERS: dict[str, type[Drafter]] = {
    each.kind: each for each in (AdapterDrafter, WeightsDrafter, LayersDrafter, NgramDrafter)
}


def register_drafter(drafter: type[Drafter]) -> type[Drafter]:
    """Register a drafter under its `kind`, and return it; a decorator.

    Raises:
        ValueError: its kind is no name or that of another class, its needs are unknown, or it cannot propose.
    """
    kind, needs = getattr(drafter, "kind", None), drafter.needs
    if not isinstance(kind, str) or not kind.isidentifier() or kind in DRAFT_WEIGHTS:
        raise ValueError(f"kind: {kind!r} of {drafter.__qualname__} is no name; give a word of its own, such as 'mine'")
    if needs not in (None, "draft_weights", "exit_adapter"):
        raise ValueError(f"needs: {needs!r} of {drafter.__qualname__} is not draft_weights, exit_adapter or None")
    if isabstract(drafter):
        raise ValueError(f"kind: {kind!r}: {drafter.__qualname__} has no method `propose`")
    known = DRAFTERS.setdefault(kind, drafter)
    if (known.__module__, known.__qualname__) != (drafter.__module__, drafter.__qualname__):
        raise ValueError(f"kind: {kind!r} is taken by {known.__module__}.{known.__qualname__}")
    return drafter


def drafts_of(kind: str | None, exit_layer: int | None, available: Available) -> list[Draft]:
    """Return the drafts of one kind, or (None) of all, that exit_layer and the model allow, the preferred one first."""
    drafters = DRAFTERS.values() if kind is None else [DRAFTERS[kind]]
    return [draft for drafter in drafters for draft in drafter.drafts(available, exit_layer)]


def check_draft(
    kind: str | None, exit_layer: int | None, count: int, available: Available, chosen_later: bool = False
) -> None:
    """Refuse a draft that this model does not have.

    Args:
        kind: None: the one that a generator prefers, or (chosen_later) that a policy picks.
        count: tokens that a round drafts at most; 0: nothing drafts.

    Raises:
        ValueError: as Drafter.check, or an exit_layer that is not that of the exit adapter.
    """
    if count:
        check_adapter_exit(exit_layer, available)
    if kind is None and not chosen_later:
        kind = next(each.kind for each in DRAFTERS.values() if available.has(each.needs))
    if kind is not None:
        DRAFTERS[kind].check(available, exit_layer, count)


def check_adapter_exit(exit_layer: int | None, available: Available) -> None:
    """Raise ValueError for an exit_layer that is not the exit adapter's, where there is one."""
    if available.adapter_exit is not None and exit_layer not in (None, available.adapter_exit):
        raise ValueError(
            f"exit_layer: {exit_layer} is not {available.adapter_exit}, for which the exit_adapter was made; leave"
            " out one of the two"
        )


def check_fixed_exit(exit_layer: int, available: Available) -> None:
    """Raise ValueError for texts that are to leave the model through an exit adapter that needs its last layer."""
    if available.adapter_joins and exit_layer == available.adapter_exit:
        raise ValueError(
            f"exit_layer: {exit_layer} alone does not go with this exit_adapter, which joins the last layer's state of"
            " the token before; draft with it (num_speculations), or train one by adapt --joins_last_state false"
        )


def round_seconds(costs: Costs, plan: DraftPlan, slots: int) -> float:
    """Return the seconds of a round of `slots` texts: drafting, and the model's pass over pending and drafted tokens.

    A round that drafts d tokens for B texts takes d c(E, B) + b(E, B) + V_E(B (d + 1)) with E blocks of the model
    drafting, d c'(E, B) + V_0(B (d + 1)) with rounded ones (c' by their times) and V_0(B (d + 1)) with n-grams, where
    c(E, n) = E block(n) + head(n), b(E, n) = E block(n) and V_E(n) = (L - E) block(n) + head(n).
    """
    draft, count, _ = plan
    if draft is None or count == 0:
        return costs.plain(slots)
    drafter = DRAFTERS[draft.kind]
    done = draft.exit_layer if drafter.leaves_states else 0
    return drafter.seconds(draft, count, slots, costs) + costs.verify(done, slots * (count + 1))


def probe_seconds(costs: Costs, plan: DraftPlan, exits: int, slots: int) -> float:
    """Return the seconds that a round of `plan` takes longer if verification's states are read at so many exits.

    A head's product with all B (d + 1) rows each; and where the draft has left states, the E blocks under them run
    again.
    """
    rows = slots * (plan.num_speculations + 1)
    seconds = exits * costs.model.head_seconds(rows)
    if plan.draft is not None and DRAFTERS[plan.draft.kind].leaves_states:
        seconds += plan.draft.exit_layer * (costs.model.block_seconds(rows) - costs.model.block_seconds(slots))
    return seconds
