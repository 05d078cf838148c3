"""The sections of questions h and i: recipes of dropout and targets of the exits, over the seeds that are finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.claims import figures
from benchmarks.claims.arms import (
    DROPOUTS,
    E_SCALE,
    EQUAL_FLOPS,
    NO_DROPOUT,
    NO_EXITS,
    P_DEPTH,
    PERIOD,
    Recipe,
    Sizes,
    make_recipes,
    make_targets,
    share_of_blocks,
)
from benchmarks.claims.results import Results
from benchmarks.claims.section import Section
from benchmarks.claims.statistics import Claim, paired, with_error, with_interval

LABELS = {
    NO_EXITS: "plain: neither dropout nor exit loss",
    NO_DROPOUT: "no dropout",
    "recipe_rising": "rising exponential (the paper's)",
    "recipe_falling": "falling, recovery, scaled",
    "recipe_alternating": "alternating, falling, recovery, scaled",
    "target_SelfDistillation": "SelfDistillation (KL)",
    "target_LK": "LK",
}
DRAFTED = (4, 8)


def recipes(results: Results) -> list[Section]:
    """Question h: its table and claims, and every layer."""
    arms = make_recipes(results.sizes)
    results = results.finished(arms, results.sizes.recipe_seeds)
    title = "(h) Recipes of layer dropout"
    if not results.seeds:
        return [_nothing_yet(title)]
    longer = tuple(name + EQUAL_FLOPS for name in DROPOUTS)
    equal = [name for name in arms if name not in longer]
    claims = [claim for name in (*DROPOUTS, *longer) for claim in _against_none(results, name)]
    claims += [
        Claim(
            f"{_label(name)}: its last layer is better than the rising exponential's",
            paired(results.last_loss("recipe_rising" + suffix), results.last_loss(name)),
        )
        for suffix in ("", EQUAL_FLOPS)
        for name in ("recipe_falling" + suffix, "recipe_alternating" + suffix)
    ]
    note = (
        f"p_max {P_DEPTH}, e_scale {E_SCALE}, Rotational {PERIOD}, batches of {results.sizes.recipe_batch_size}; seeds"
        f" finished: {len(results.seeds)}. Equal FLOPs: as many executions of a block for a sequence, in expectation,"
        " as without dropout; what the further steps cost in embedding and heads is not counted. Differences are to no"
        " dropout, by seed, with their 95 % interval."
    )
    rows = [_row(results, _label(name), name, arms[name]) for name in arms]
    shown = {_label(name): results.curves(name) for name in equal if name != NO_EXITS}
    picture = {"claims_recipes.png": figures.by_depth(shown)}
    return [
        Section(title, _header(results.sizes), rows, claims, picture, note),
        _by_layer("h", results, {_label(name): name for name in arms}),
    ]


def targets(results: Results) -> list[Section]:
    """Question i: its table and claims, and every layer."""
    arms = make_targets(results.sizes)
    results = results.finished(arms, results.sizes.recipe_seeds)
    title = "(i) Targets of the exits"
    if not results.seeds:
        return [_nothing_yet(title)]
    middle = results.sizes.middle
    tokens = {name: results.tokens_per_round(name, middle, DRAFTED[0]) for name in arms}
    kl, lk = "target_SelfDistillation", "target_LK"
    pairs = [("KL", kl, "the labels", NO_DROPOUT), ("LK", lk, "the labels", NO_DROPOUT), ("LK", lk, "KL", kl)]
    claims = [
        Claim(
            f"{first} brings layer {middle} more tokens per round (d = {DRAFTED[0]}) than {second}",
            paired(tokens[one], tokens[other]),
            "tokens",
        )
        for first, one, second, other in pairs
    ]
    claims += [
        Claim(f"{first} leaves the last layer better than {second}", paired(*map(results.last_loss, (other, one))))
        for first, one, second, other in pairs
    ]
    note = (
        f"No dropout, e_scale {E_SCALE}, Rotational {PERIOD}; seeds finished: {len(results.seeds)}. Differences are to"
        " Labels."
    )
    labels = {"Labels" if name == NO_DROPOUT else _label(name): name for name in arms}
    rows = [_row(results, label, name, arms[name]) for label, name in labels.items()]
    return [Section(title, _header(results.sizes), rows, claims, {}, note), _by_layer("i", results, labels)]


def _nothing_yet(title: str) -> Section:
    return Section(title, ["arm"], [["no seed is finished in all arms"]], [], {})


def _label(name: str) -> str:
    base = name.removesuffix(EQUAL_FLOPS)
    return LABELS[base] + (", equal FLOPs" if base != name else "")


def _header(sizes: Sizes) -> list[str]:
    early = [f"tokens per round, layer {layer}, d = {d}" for layer in _exits(sizes) for d in DRAFTED]
    loss = [f"loss, layer {sizes.middle}", f"loss, layer {sizes.layers} (last)"]
    return ["arm", "steps", "blocks run", *loss, "last layer, difference", *early]


def _exits(sizes: Sizes) -> tuple[int, int]:
    return sizes.layers // 4, sizes.middle


def _row(results: Results, label: str, name: str, recipe: Recipe) -> list[str]:
    sizes = results.sizes
    share = share_of_blocks(recipe.arm, sizes.layers, recipe.steps) * recipe.steps / sizes.recipe_steps
    difference = paired(results.last_loss(name), results.last_loss(NO_DROPOUT))
    tokens = (results.tokens_per_round(name, layer, d) for layer in _exits(sizes) for d in DRAFTED)
    return [
        label,
        str(recipe.steps),
        f"{share:.3f}",
        *(with_error(results.loss(name, layer)) for layer in (sizes.middle, sizes.layers)),
        "-" if name == NO_DROPOUT else with_interval(difference),
        *(with_error(values, 2) for values in tokens),
    ]


def _against_none(results: Results, name: str) -> Iterable[Claim]:
    middle = results.sizes.middle
    yield Claim(
        f"{_label(name)}: its last layer is better than without dropout",
        paired(results.last_loss(NO_DROPOUT), results.last_loss(name)),
    )
    yield Claim(
        f"{_label(name)}: more tokens per round from layer {middle} (d = {DRAFTED[0]}) than without dropout",
        paired(*(results.tokens_per_round(each, middle, DRAFTED[0]) for each in (name, NO_DROPOUT))),
        "tokens",
    )


def _by_layer(question: str, results: Results, arms: Mapping[str, str]) -> Section:
    """Return the loss and tokens per round of every layer, for label -> arm."""
    layers = range(1, results.sizes.layers + 1)
    rows = []
    for label, name in arms.items():
        rows.append([f"{label}: loss", *(with_error(results.loss(name, layer)) for layer in layers)])
        for d in DRAFTED:
            tokens = (results.tokens_per_round(name, layer, d) for layer in layers)
            rows.append([f"… tokens per round, d = {d}", *(with_error(values, 2) for values in tokens)])
    return Section(f"({question}) Every layer", ["arm", *map(str, layers)], rows, [], {})
