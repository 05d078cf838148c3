"""Arms (ways to train) of the claims benchmark, and the sizes of models and runs."""

from __future__ import annotations

from dataclasses import dataclass

from lskip.callbacks import EarlyExitLoss, LayerDropout
from lskip.curricula import AllExits, ExitCurriculum, Gradual, LastExit, Rotational
from lskip.schedules import Constant, Exponential, Linear, Schedule
from lskip.targets import ExitTarget, Labels, SelfDistillation

P_GRID, E_GRID = (0.0, 0.2, 0.5), (0.0, 0.2, 1.0)
P_MAX, E_SCALE = 0.2, 0.2  # of questions b, c, e, f and g
P_DEPTH = 0.5  # of question a: a rate whose effect is larger than the noise
PERIOD = 4

DEPTHS: dict[str, type[Schedule]] = {"Exponential": Exponential, "Linear": Linear, "Constant": Constant}
CURRICULA: dict[str, type[ExitCurriculum]] = {
    "AllExits": AllExits,
    "Rotational": Rotational,
    "Gradual": Gradual,
    "LastExit": LastExit,
}
TARGETS: dict[str, type[ExitTarget]] = {"Labels": Labels, "SelfDistillation": SelfDistillation}


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
    items=24, warmup_steps=10, timed_rounds=4,
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A way to train; names are keys of DEPTHS, CURRICULA and TARGETS."""

    p_max: float = 0.0
    depth: str = "Exponential"
    e_scale: float = 0.0
    curriculum: str = "LastExit"
    target: str = "Labels"

    def callbacks(self) -> list:
        """Nothing where the arm has no dropout, or no early exit."""
        made = []
        if self.p_max > 0:
            made.append(LayerDropout(self.p_max, DEPTHS[self.depth](), Constant()))
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
