"""The options of `lskip adapt`: data and training of an exit adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lskip.data.arguments import check_cache
from lskip.inference.prompt_file import Prompt, read_prompts
from lskip.targets import LK, SelfDistillation
from lskip.utils.checks import check_choice, check_real, check_whole
from lskip.utils.user_paths import user_path

Precision = Literal["32-true", "bf16-mixed"]
Target = Literal["kl", "lk"]
TARGETS = {"kl": SelfDistillation, "lk": LK}
DEFAULT_STEPS = 2000
YEAR = 365 * 24 * 60  # minutes


@dataclass(frozen=True)
class AdapterData:
    """Data of an adapter: prompts, which the model answers first, or answers that it has written.

    Attributes:
        prompts: a .txt file with a prompt a line, or .jsonl with {"prompt": …} or {"messages": …} a line. The model
            answers them greedily; the answers are kept, with their states.
        answers: instead of prompts, list of .jsonl files that `lskip predict` wrote with this model, greedy or sampled.
        max_new_tokens: of an answer to a prompt, at most.
        answers_at_once: prompts that are answered together.
        block_size: tokens of a prompt with its answer; longer ones are cut.
        chat: whether plain prompts go through the chat template (for answers: whether they did in `lskip predict`);
            null: where the model has one.
        cache_dir: folder for the states, for SmolLM2 2.3 KB a token and 1.2 KB for each further exit_layer; null:
            ~/.cache/lskip.

    Raises:
        ValueError: both prompts and answers, or neither; a number out of its range; a cache_dir that is not writable.
    """

    prompts: str | None = None
    answers: list[str] | None = None
    max_new_tokens: int = 160
    answers_at_once: int = 64
    block_size: int = 256
    chat: bool | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        if (self.prompts is None) == (not self.answers):
            raise ValueError("prompts: give either prompts or answers, a file of one kind or the other")
        for name in ("max_new_tokens", "answers_at_once"):
            check_whole(name, getattr(self, name), 1)
        check_whole("block_size", self.block_size, 2)
        check_cache(self.cache_dir)

    @property
    def cache(self) -> Path:
        """The folder of cached states."""
        return check_cache(self.cache_dir) / "adapter_states"

    @property
    def answer_files(self) -> list[Path]:
        return [user_path(path, "answers") for path in self.answers or ()]

    def read_prompts(self) -> list[Prompt] | None:
        """Return the prompts, or None if `answers` are given.

        Raises:
            FileNotFoundError: no such file, of prompts or of answers.
            ValueError: the file holds no prompts.
        """
        for path in self.answer_files:
            if not path.is_file():
                raise FileNotFoundError(f"answers: there is no file '{path}'")
        return None if self.prompts is None else read_prompts(user_path(self.prompts, "prompts"))


@dataclass(frozen=True)
class AdapterTraining:
    """Training of an adapter.

    Attributes:
        max_steps: optimizer steps, at most; null: 2000, or with max_minutes as many as fit into that time.
        max_minutes: time limit of training, validations included, by which the learning rate is decayed; two such runs
            are not the same to the bit. null: max_steps alone decides.
        batch_size: answers a step.
        lr: peak learning rate of AdamW.
        warmup_steps: optimizer steps until the peak.
        target: kl: the last layer's distribution; lk: the share of drafts that it would accept (LK losses,
            arXiv 2602.23881, their mixture with KL).
        unroll: draft steps to train on, each on the adapter's own states of the step before.
        decay: weight of a draft step in the loss, relative to the step before.
        unroll_every: draft steps after the first are trained on drafts that begin at every n-th position.
        ema: decay a step of the moving average of the weights, which is saved; null: the last weights are saved.
        precision: of training; bf16-mixed computes the model's states in bfloat16 too, faster where the CPU can.
        val_every: optimizer steps between two validations.
        val_answers: held-out answers of a validation; the final metrics are on all of them.
        checkpoint_every: optimizer steps between two checkpoints.
        seed: of the order of the answers.

    Raises:
        ValueError: a number out of its range.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 16
    lr: float = 1e-3
    warmup_steps: int = 50
    target: Target = "kl"
    unroll: int = 3
    decay: float = 0.8
    unroll_every: int = 3
    ema: float | None = 0.995
    precision: Precision = "32-true"
    val_every: int = 250
    val_answers: int = 64
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "unroll", "unroll_every", "val_every", "val_answers", "checkpoint_every"):
            check_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            check_whole(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed: {self.seed} is not below 2**63")
        for name in ("lr", "decay"):
            check_real(name, getattr(self, name), "above 0, at most 1", lambda value: 0 < value <= 1)
        if self.max_steps is not None:
            check_whole("max_steps", self.max_steps, 1)
        if self.max_minutes is not None:
            check_real("max_minutes", self.max_minutes, "above 0, at most a year", lambda value: 0 < value <= YEAR)
        if self.ema is not None:
            check_real("ema", self.ema, "between 0 and 1", lambda value: 0 < value < 1)
        check_choice("target", self.target, get_args(Target))
        check_choice("precision", self.precision, get_args(Precision))

    @property
    def steps(self) -> int:
        """The Trainer's max_steps; -1: limited by max_minutes only."""
        return self.max_steps or (DEFAULT_STEPS if self.max_minutes is None else -1)
