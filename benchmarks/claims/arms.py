"""Arms (ways to train) of the claims benchmark, and the sizes of models and runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lskip.callbacks import EarlyExitLoss, LayerDropout
from lskip.curricula import AllExits, ExitCurriculum, Gradual, LastExit, Rotational
from lskip.schedules import Alternating, Constant, Exponential, Falling, Linear, Schedule
from lskip.targets import LK, ExitTarget, Labels, SelfDistillation

P_GRID, E_GRID = (0.0, 0.2, 0.5), (0.0, 0.2, 1.0)
P_MAX, E_SCALE = 0.2, 0.2  # of questions b, c, e, f and g
P_DEPTH = 0.5  # of questions a and h: a rate whose effect is larger than the noise
PERIOD = 4

DEPTHS: dict[str, type[Schedule]] = {"Exponential": Exponential, "Linear": Linear, "Constant": Constant}
ALL_DEPTHS: dict[str, type[Schedule]] = {**DEPTHS, "Alternating": Alternating}
TIMES: dict[str, type[Schedule]] = {"Constant": Constant, "Exponential": Exponential, "Falling": Falling}
CURRICULA: dict[str, type[ExitCurriculum]] = {
    "AllExits": AllExits,
    "Rotational": Rotational,
    "Gradual": Gradual,
    "LastExit": LastExit,
}
TARGETS: dict[str, type[ExitTarget]] = {"Labels": Labels, "SelfDistillation": SelfDistillation, "LK": LK}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and lengths of the runs.

    Attributes:
        source: of the text, as TextData takes it.
        steps: of an arm from scratch.
        long_steps: of the one plain run of question f.
        retrofit_steps: of LayerSkip from one of its checkpoints.
        readings: how often the long run is validated; 10, 50 and 100 % of it must be among them.
        seeds: of each arm. The long run has one.
        items: of each task of question g; prompts of `prompt_tokens`, answers of `answer_tokens`.
        timed_rounds: of the step times of question c.
        recipe_steps, recipe_batch_size, recipe_readings, recipe_seeds: of the arms of questions h and i.
    """

    source: str = "stdlib"
    layers: int = 8
    hidden: int = 128
    intermediate: int = 384
    heads: int = 4
    vocabulary: int = 1024
    block_size: int = 128
    batch_size: int = 8
    learning_rate: float = 3e-3
    retrofit_learning_rate: float = 1e-3
    warmup_steps: int = 50
    steps: int = 700
    long_steps: int = 10_000
    retrofit_steps: int = 350
    readings: int = 20
    seeds: int = 3
    max_val_blocks: int = 256
    items: int = 200
    prompt_tokens: int = 48
    answer_tokens: int = 16
    timed_rounds: int = 16
    recipe_steps: int = 2_000
    recipe_batch_size: int = 4
    recipe_readings: int = 4
    recipe_seeds: int = 5

    @property
    def middle(self) -> int:
        """The middle exit layer, which most claims are about."""
        return self.layers // 2

    @property
    def snapshots(self) -> dict[int, int]:
        """Per cent of the long run -> its step."""
        return {share: self.long_steps * share // 100 for share in (10, 50, 100)}

    def model_config(self) -> dict:
        return {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.block_size,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


# Everything runs, nothing is learned well: under 10 minutes on 2 cores.
QUICK = Sizes(
    hidden=64, intermediate=192, steps=60, long_steps=200, retrofit_steps=40, readings=10, seeds=2, max_val_blocks=32,
    items=24, warmup_steps=10, timed_rounds=4, recipe_steps=60, recipe_seeds=2,
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A way to train; names are keys of ALL_DEPTHS, TIMES, CURRICULA and TARGETS."""

    p_max: float = 0.0
    depth: str = "Exponential"
    e_scale: float = 0.0
    curriculum: str = "LastExit"
    target: str = "Labels"
    time: str = "Constant"
    scale_kept: bool = False

    @property
    def dropout(self) -> LayerDropout:
        return LayerDropout(self.p_max, ALL_DEPTHS[self.depth](), TIMES[self.time](), self.scale_kept)

    def callbacks(self) -> list:
        """Nothing where the arm has no dropout, or no early exit."""
        made = []
        if self.p_max > 0:
            made.append(self.dropout)
        if self.e_scale > 0:
            made.append(EarlyExitLoss(self.e_scale, make_curriculum(self.curriculum)))
        return made


def make_curriculum(name: str) -> ExitCurriculum:
    return Rotational(PERIOD) if name == "Rotational" else CURRICULA[name]()


def grid_name(p_max: float, e_scale: float) -> str:
    return f"p{p_max:g}_e{e_scale:g}"


NEITHER, DROPOUT = grid_name(0, 0), grid_name(P_MAX, 0)
EXITS, BOTH = grid_name(0, E_SCALE), grid_name(P_MAX, E_SCALE)
DEEP_DROPOUT = grid_name(P_DEPTH, 0)


def make_arms(layers: int) -> dict[str, Arm]:
    """Name -> arm from scratch. The grid of question d holds most of what the others ask for."""
    arms = {
        grid_name(p, e): Arm(p, "Exponential", e, "Rotational" if e else "LastExit") for p in P_GRID for e in E_GRID
    }
    for depth in ("Linear", "Constant"):
        arms[f"depth_{depth}"] = Arm(equal_mean_rate(depth, layers), depth)
    for curriculum in ("AllExits", "Gradual"):
        arms[f"curriculum_{curriculum}"] = Arm(e_scale=E_SCALE, curriculum=curriculum)
    arms["distilled"] = Arm(P_MAX, "Exponential", E_SCALE, "Rotational", "SelfDistillation")
    return arms


def equal_mean_rate(depth: str, layers: int) -> float:
    """p_max at which `depth` drops as many blocks on average as Exponential does at P_DEPTH."""
    means = {name: sum(schedule()(block, layers) for block in range(layers)) for name, schedule in DEPTHS.items()}
    return P_DEPTH * means["Exponential"] / means[depth]


# Questions h and i: the same early exit loss in all arms but one.
NO_DROPOUT, NO_EXITS = "recipe_none", "recipe_plain"
DROPOUTS = {
    "recipe_rising": Arm(P_DEPTH, "Exponential", time="Exponential"),
    "recipe_falling": Arm(P_DEPTH, "Exponential", time="Falling", scale_kept=True),
    "recipe_alternating": Arm(P_DEPTH, "Alternating", time="Falling", scale_kept=True),
}
EQUAL_FLOPS = "_equal_flops"  # the suffix of an arm that trains longer


@dataclass(frozen=True)
class Recipe:
    """An arm of questions h or i and its number of steps."""

    arm: Arm
    steps: int


def make_recipes(sizes: Sizes) -> dict[str, Recipe]:
    """Return name -> recipe for question h; those with dropout twice, at equal steps and at equal FLOPs."""
    exits = {"e_scale": E_SCALE, "curriculum": "Rotational"}
    recipes = {NO_EXITS: Recipe(Arm(), sizes.recipe_steps), NO_DROPOUT: Recipe(Arm(**exits), sizes.recipe_steps)}
    for name, dropout in DROPOUTS.items():
        arm = replace(dropout, **exits)
        recipes[name] = Recipe(arm, sizes.recipe_steps)
        recipes[name + EQUAL_FLOPS] = Recipe(arm, steps_at_equal_flops(arm, sizes))
    return recipes


def make_targets(sizes: Sizes) -> dict[str, Recipe]:
    """Return name -> recipe for question i, all without dropout; the labels are an arm of h."""
    labels = make_recipes(sizes)[NO_DROPOUT]
    others = {f"target_{name}": replace(labels, arm=replace(labels.arm, target=name)) for name in TARGETS}
    return {NO_DROPOUT: labels, **{name: recipe for name, recipe in others.items() if recipe != labels}}


def share_of_blocks(arm: Arm, layers: int, steps: int) -> float:
    """Return the share of all blocks and sequences that a run executes, in expectation."""
    rates = [sum(arm.dropout.drop_rates(step, steps, layers)) for step in range(steps)]
    return 1 - sum(rates) / (steps * layers)


def steps_at_equal_flops(arm: Arm, sizes: Sizes) -> int:
    """Return the steps at which a run executes as many blocks as one of recipe_steps without dropout.

    Rounded up to a multiple of the readings, so that the last reading is at the end.
    """
    steps = sizes.recipe_steps / share_of_blocks(arm, sizes.layers, sizes.recipe_steps)
    return math.ceil(steps / sizes.recipe_readings) * sizes.recipe_readings
