"""The report of the claims benchmark: one section per question, with table, claims, verdicts and figure."""

from __future__ import annotations

import math

from benchmarks.claims import figures
from benchmarks.claims.arms import (
    BOTH,
    DEEP_DROPOUT,
    DROPOUT,
    E_GRID,
    E_SCALE,
    EXITS,
    NEITHER,
    P_DEPTH,
    P_GRID,
    P_MAX,
    Sizes,
    grid_name,
)
from benchmarks.claims.recipe_report import recipes
from benchmarks.claims.recipe_report import targets as recipe_targets
from benchmarks.claims.results import Results
from benchmarks.claims.section import Section
from benchmarks.claims.statistics import RULE, Claim, paired, with_error


def make_sections(results: Results, questions: str) -> list[Section]:
    """Return the sections of the questions "abc…", in the order of the letters."""
    single = dict(zip("abcdefg", (depth_schedules, ablation, curricula, grid, targets, retrofits, tasks), strict=True))
    several = {"h": recipes, "i": recipe_targets}
    sections = [[single[each](results)] if each in single else several[each](results) for each in sorted(questions)]
    return [section for part in sections for section in part]


def report(sections: list[Section], where: dict) -> str:
    """Return the whole page: rule, sections, claims that did not reproduce, environment."""
    claims = [claim for section in sections for claim in section.claims]
    failed = "\n".join(claim.line() for claim in claims if claim.verdict() != "reproduced") or "- nothing"
    measured = ", ".join(f"{name} {value}" for name, value in where.items())
    parts = [RULE, "Numbers are means ± standard errors over seeds; loss in nats a token on held-out text."]
    parts += [section.markdown() for section in sections]
    return "\n\n".join([*parts, "### What did not reproduce", failed, f"Measured: {measured}."]) + "\n"


def _arm_row(results: Results, label: str, name: str, *more: str) -> list[str]:
    layers = (results.sizes.middle, results.sizes.layers)
    return [label, *(with_error(results.loss(name, layer)) for layer in layers), *more]


def _columns(sizes: Sizes, first: str, *more: str) -> list[str]:
    return [first, f"loss, layer {sizes.middle}", f"loss, layer {sizes.layers} (last)", *more]


def depth_schedules(results: Results) -> Section:
    arms = {"Exponential": DEEP_DROPOUT, "Linear": "depth_Linear", "Constant": "depth_Constant"}
    last = {name: results.last_loss(arm) for name, arm in arms.items()}
    claims = [
        Claim(f"{other} dropout costs the last layer more than Exponential", paired(last[other], last["Exponential"]))
        for other in ("Linear", "Constant")
    ]
    rows = [_arm_row(results, name, arm) for name, arm in arms.items()]
    rows.append(_arm_row(results, "no dropout", NEITHER))
    title = "(a) Depth schedules of layer dropout at equal mean rate"
    note = f"Without early exits; Exponential at p_max {P_DEPTH}."
    return Section(title, _columns(results.sizes, "dropout"), rows, claims, {}, note)


def ablation(results: Results) -> Section:
    arms = {"neither": NEITHER, "dropout alone": DROPOUT, "exit loss alone": EXITS, "both": BOTH}
    middle = {name: results.loss(arm, results.sizes.middle) for name, arm in arms.items()}
    last = {name: results.last_loss(arm) for name, arm in arms.items()}
    claims = [
        Claim("The exit loss makes the middle layer better", paired(middle["neither"], middle["exit loss alone"])),
        Claim("Dropout makes the middle layer better", paired(middle["neither"], middle["dropout alone"])),
        Claim("With dropout the exit loss reaches further", paired(middle["exit loss alone"], middle["both"])),
        Claim("Both together cost the last layer something", paired(last["both"], last["neither"])),
    ]
    rows = [_arm_row(results, name, arm) for name, arm in arms.items()]
    curves = {name: results.curves(arm) for name, arm in arms.items()}
    title = "(b) Dropout, exit loss, both, neither"
    note = f"p_max {P_MAX}, e_scale {E_SCALE}, rotational."
    picture = {"claims_depth.png": figures.by_depth(curves)}
    return Section(title, _columns(results.sizes, "trained with"), rows, claims, picture, note)


def curricula(results: Results) -> Section:
    arms = {
        "AllExits": "curriculum_AllExits",
        "Rotational": EXITS,
        "Gradual": "curriculum_Gradual",
        "LastExit": NEITHER,
    }
    last = {name: results.last_loss(arm) for name, arm in arms.items()}
    claims = [
        Claim(f"{name} costs the last layer less than AllExits", paired(last["AllExits"], last[name]))
        for name in ("Rotational", "Gradual")
    ]
    times = results.step_times()
    rows = [_arm_row(results, name, arm, f"{times[name]:.2f}") for name, arm in arms.items()]
    title = "(c) Curricula"
    note = f"e_scale {E_SCALE}, without dropout; time of a step against LastExit, paired and interleaved."
    return Section(title, _columns(results.sizes, "curriculum", "step time"), rows, claims, {}, note)


def grid(results: Results) -> Section:
    sizes = results.sizes
    rows = [
        _arm_row(
            results, f"p_max {p:g}, e_scale {e:g}", grid_name(p, e), with_error(results.agreement(grid_name(p, e)))
        )
        for p in P_GRID
        for e in E_GRID
    ]

    def mean_over(values, names):
        return [sum(seed) / len(names) for seed in zip(*(values(name) for name in names), strict=True)]

    def middle(name):
        return results.loss(name, sizes.middle)

    by_e = {e: [grid_name(p, e) for p in P_GRID] for e in E_GRID}
    by_p = {p: [grid_name(p, e) for e in E_GRID] for p in P_GRID}
    low_e, high_e, low_p, high_p = by_e[E_GRID[1]], by_e[E_GRID[-1]], by_p[P_GRID[0]], by_p[P_GRID[-1]]
    last = results.last_loss
    claims = [
        Claim("A larger e_scale makes the middle better", paired(mean_over(middle, low_e), mean_over(middle, high_e))),
        Claim("A larger e_scale costs the last layer more", paired(mean_over(last, high_e), mean_over(last, low_e))),
        Claim("A larger p_max costs the last layer more", paired(mean_over(last, high_p), mean_over(last, low_p))),
    ]
    columns = _columns(sizes, "arm", f"agreement, layer {sizes.middle}")
    note = (
        f"Claims compare e_scale {E_GRID[1]:g} and {E_GRID[-1]:g} over all p_max, p_max {P_GRID[0]:g} and"
        f" {P_GRID[-1]:g} over all e_scale."
    )
    return Section("(d) p_max and e_scale", columns, rows, claims, {}, note)


def targets(results: Results) -> Section:
    arms = {"labels": BOTH, "self-distillation": "distilled"}
    rows = [_arm_row(results, name, arm, with_error(results.agreement(arm))) for name, arm in arms.items()]
    claims = [
        Claim(
            "Self-distillation makes the middle agree more with the last layer",
            paired(results.agreement("distilled"), results.agreement(BOTH)),
            "of positions",
        ),
        Claim("It costs the last layer less", paired(results.last_loss(BOTH), results.last_loss("distilled"))),
    ]
    columns = _columns(results.sizes, "exits learn", f"agreement, layer {results.sizes.middle}")
    note = f"p_max {P_MAX}, e_scale {E_SCALE}, rotational."
    return Section("(e) Targets of the exits", columns, rows, claims, {}, note)


def retrofits(results: Results) -> Section:
    sizes, start = results.sizes, results.long_readings()
    names = {f"after {share} %": f"retrofit_{share}" for share in sizes.snapshots}
    gap = {label: results.gap(name) for label, name in [*names.items(), ("from scratch", BOTH)]}
    rows = [
        _arm_row(results, f"{label} of the plain run", name, with_error(gap[label])) for label, name in names.items()
    ]
    rows.append(_arm_row(results, "from scratch", BOTH, with_error(gap["from scratch"])))
    first, middle, full = names
    lowest = min(reading["loss"][sizes.middle - 1] for reading in start)
    rise = start[-1]["loss"][sizes.middle - 1] - lowest
    claims = [
        Claim("50 % plain training leaves a harder retrofit than 10 %", paired(gap[middle], gap[first])),
        Claim("100 % leaves a harder one than 50 %", paired(gap[full], gap[middle])),
        Claim("From scratch the gap is smaller than after the whole run", paired(gap[full], gap["from scratch"])),
    ]
    note = (
        f"A plain run of {sizes.long_steps} steps (one seed: errors are those of the retrofits alone), LayerSkip for"
        f" {sizes.retrofit_steps} steps from its checkpoints, against {sizes.steps} steps from scratch. The gap is loss"
        f" at layer {sizes.middle} less loss at the last: the harder the retrofit, the wider. During the plain run the"
        f" loss of layer {sizes.middle} ended {rise:.2f} nats above its lowest reading ({lowest:.2f}), that of the last"
        f" layer at {start[-1]['loss'][-1]:.2f}."
    )
    columns = _columns(sizes, "LayerSkip", "gap")
    picture = {"claims_time.png": figures.over_time(start)}
    return Section("(f) Plain training, then LayerSkip", columns, rows, claims, picture, note)


def tasks(results: Results) -> Section:
    sizes = results.sizes
    choice, generation = results.task("multiple_choice"), results.task("open_generation")
    kept = {"multiple choice": results.retention("multiple_choice"), "open": results.retention("open_generation")}
    rows = [
        [
            str(layer + 1),
            with_error([seed[layer] for seed in choice]),
            with_error([seed[layer] for seed in generation]),
            *(with_error([seed[layer] for seed in values], 2) for values in kept.values()),
        ]
        for layer in range(sizes.layers)
    ]
    middle = sizes.middle - 1
    at_middle = {name: [seed[middle] for seed in values] for name, values in kept.items()}
    sound = all(math.isfinite(value) for values in at_middle.values() for value in values)
    claim = Claim(
        f"At layer {sizes.middle} multiple choice keeps more of the last layer's score than open generation",
        paired(at_middle["multiple choice"], at_middle["open"]) if sound else (),
        "of the last layer's score",
    )
    columns = ("layer", "multiple choice", "open generation", "choice kept", "open kept")
    note = (
        f"The models of (b), both; {sizes.items} held-out items, {sizes.prompt_tokens} tokens to continue. Multiple"
        " choice: accuracy among 4 continuations. Open generation: similarity of the greedy continuation"
        " with the text's own."
        " Kept: (score - chance) / (the last layer's - chance)."
    )
    picture = {"claims_tasks.png": figures.kept_by_depth(kept)}
    claims = [claim] if sound else []
    return Section("(g) Few answers and open generation", columns, rows, claims, picture, note)
