"""The cells of a sweep: draft, exit layer, number of tokens and policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lskip.inference.drafting.drafter import Drafter
from lskip.inference.drafting.registry import DRAFTERS
from lskip.inference.options import DraftWeights, LoadingOptions
from lskip.inference.settings import AUTO
from lskip.models.exit_adapter import find_adapter
from lskip.utils.checks import check_choice, check_whole

PolicyName = Literal["FixedDraft", "ConfidenceDraft", "CostAwareDraft"]
DRAFT_WEIGHTS = get_args(DraftWeights)
SHARES = (1 / 6, 1 / 4, 1 / 3, 1 / 2)  # of the layers: the default exits


@dataclass(frozen=True)
class Cell:
    """Settings of one cell.

    Attributes:
        draft: as `--draft`, or a name in DRAFT_WEIGHTS: draft "weights" of these `draft_weights`.
        exit_layer: blocks that draft; None: all blocks (DRAFT_WEIGHTS), or the draft has no such setting.
        num_speculations: tokens drafted; at most, where another policy than FixedDraft decides.
        policy: the name of a DraftPolicy.
    """

    draft: str
    exit_layer: int | None
    num_speculations: int
    policy: str = "FixedDraft"

    def __str__(self) -> str:
        exit_layer = "" if self.exit_layer is None else f" exit_layer={self.exit_layer}"
        policy = "" if self.policy == "FixedDraft" else f" {self.policy}"
        return f"{self.draft}{exit_layer} num_speculations={self.num_speculations}{policy}"

    @property
    def draft_weights(self) -> str | None:
        return self.draft if self.draft in DRAFT_WEIGHTS else None

    @property
    def drafter(self) -> type[Drafter]:
        return drafter_named(self.draft)

    def settings(self) -> dict[str, Any]:
        """Return the cell as fields of GenerationSettings, without the policy."""
        kind = self.drafter.kind
        return {"draft": kind, "exit_layer": self.exit_layer, "num_speculations": self.num_speculations}


@dataclass(frozen=True, kw_only=True)
class CriterionCell(Cell):
    """A cell whose draft ends where an exit criterion is unsure: CriterionDraft.

    Attributes:
        criterion: the name of a MeasuredExit.
        threshold: its threshold.
    """

    policy: str = "CriterionDraft"
    criterion: str
    threshold: float


def cell_of(record: dict[str, Any]) -> Cell:
    """Return the cell of a record."""
    kind = CriterionCell if "criterion" in record else Cell
    return kind(**{name: record[name] for name in kind.__dataclass_fields__})


def draft_names() -> tuple[str, ...]:
    """Return the values that a cell's `draft` may have."""
    return (*(kind for kind in DRAFTERS if kind != "weights"), *DRAFT_WEIGHTS)


def drafter_named(draft: str) -> type[Drafter]:
    """Return the drafter of cells with this `draft`."""
    return DRAFTERS["weights" if draft in DRAFT_WEIGHTS else draft]


def grid(
    drafts: Sequence[str],
    exit_layers: Sequence[int] | None,
    num_speculations: Sequence[int],
    policies: Sequence[str],
    num_layers: int,
) -> list[Cell]:
    """Return all cells, those of one draft side by side.

    Args:
        exit_layers: for drafts that exit; the last layer stands for all blocks of rounded weights. None: SHARES of the
            layers, and all blocks for rounded weights, which exit at SHARES too where "layers" do.

    Raises:
        ValueError: these values make no cell, or an exit_layer is beyond the model.
    """
    cells = []
    for draft in dict.fromkeys(drafts):
        named = exit_layers
        if exit_layers is None and draft in DRAFT_WEIGHTS and "layers" in drafts:
            named = [*exits_of("layers", None, num_layers), num_layers]
        for exit_layer in exits_of(draft, named, num_layers):
            cells += [Cell(draft, exit_layer, count, policy) for policy in policies for count in num_speculations]
    if not cells:
        raise ValueError(
            f"exit_layers: {list(exit_layers or ())} leaves no layer from 1 to {num_layers - 1} to draft with"
        )
    return cells


def exits_of(draft: str, exit_layers: Sequence[int] | None, num_layers: int) -> list[int | None]:
    """Return the exit layers of a draft's cells; None: the draft has none, or runs all blocks."""
    for exit_layer in exit_layers or ():
        if exit_layer > num_layers:
            raise ValueError(f"exit_layers: {exit_layer} is not from 1 to {num_layers}, the model's layers")
    if not drafter_named(draft).takes_exit or (draft in DRAFT_WEIGHTS and exit_layers is None):
        return [None]
    given = sorted({max(1, round(share * num_layers)) for share in SHARES} if exit_layers is None else set(exit_layers))
    if draft in DRAFT_WEIGHTS:
        return [None if exit_layer == num_layers else exit_layer for exit_layer in given]
    return [exit_layer for exit_layer in given if exit_layer < num_layers]


def check_grid(
    drafts: Sequence[str],
    exit_layers: Sequence[int] | None,
    num_speculations: Sequence[int],
    policies: Sequence[str],
    loading: LoadingOptions,
) -> None:
    """Check a grid's values as far as is possible before a model is loaded.

    Raises:
        ValueError: an empty list or a value that no model allows, or loading options that a grid sets itself.
        FileNotFoundError: no such exit_adapter.
    """
    lists = {"drafts": drafts, "exit_layers": exit_layers, "num_speculations": num_speculations, "policies": policies}
    for name, values in lists.items():
        if values is not None and not values:
            raise ValueError(f"{name}: is an empty list; name at least one value")
    for exit_layer in exit_layers or ():
        check_whole("exit_layers", exit_layer, 1)
    for count in num_speculations:
        check_whole("num_speculations", count, 1)
    for name, given, choices in (("drafts", drafts, draft_names()), ("policies", policies, get_args(PolicyName))):
        for value in given:
            check_choice(name, value, choices)
    if loading.weights in drafts:
        raise ValueError(f"drafts: {loading.weights!r} is what weights are already; leave one of the two out")
    if loading.draft_weights is not None:
        raise ValueError(f"draft_weights: {loading.draft_weights!r} is set by the grid here; use drafts [int8, int4]")
    if loading.costs_file not in (None, AUTO):
        raise ValueError("costs_file: is not for a grid, which measures the costs of each draft anew; leave it out")
    needs = {draft: drafter_named(draft).needs for draft in drafts}
    for draft, needed in needs.items():
        if needed == "draft_weights" and draft not in DRAFT_WEIGHTS:
            raise ValueError(
                f"drafts: {draft!r} needs draft_weights, which a grid has for {', '.join(DRAFT_WEIGHTS)} alone"
            )
    if ("exit_adapter" in needs.values()) != (loading.exit_adapter is not None):
        raise ValueError(
            f"exit_adapter: is {loading.exit_adapter!r}; the draft 'adapter' needs one, no other takes one"
        )
    if loading.exit_adapter is not None:
        find_adapter(loading.exit_adapter)
