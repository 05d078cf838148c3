"""The options of `lskip adapt`: what an exit adapter is trained on, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lskip.data.arguments import check_cache
from lskip.inference.prompt_file import Prompt, read_prompts
from lskip.utils.checks import check_choice, check_real, check_whole
from lskip.utils.user_paths import user_path

Precision = Literal["32-true", "bf16-mixed"]
DEFAULT_STEPS = 2000
YEAR = 365 * 24 * 60  # minutes


@dataclass(frozen=True)
class AdapterData:
    """What an adapter is trained on: prompts, which the model answers first, or answers that it has written.

    Attributes:
        prompts: a .txt file with a prompt a line, or .jsonl with {"prompt": …} or {"messages": …} a line. The model
            answers them greedily; the answers are kept, with their states.
        answers: instead of prompts, list of .jsonl files that `lskip predict` wrote with this model (sampled ones may
            stand beside greedy ones).
        max_new_tokens: of an answer to a prompt, at most.
        answers_at_once: prompts that are answered together.
        block_size: tokens of a prompt with its answer; longer ones are cut.
        chat: whether plain prompts go through the chat template (for answers: whether they did in `lskip predict`);
            null: where the model has one.
        cache_dir: where the states are kept, for SmolLM2 2.3 KB a token and 1.2 of each further exit_layer; null:
            ~/.cache/lskip.

    Raises:
        ValueError: both prompts and answers, or neither; a number out of its range; a cache_dir that can be none.
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
        """The folder for states."""
        return check_cache(self.cache_dir) / "adapter_states"

    @property
    def answer_files(self) -> list[Path]:
        return [user_path(path, "answers") for path in self.answers or ()]

    def read_prompts(self) -> list[Prompt] | None:
        """The prompts, or None where there are answers.

        Raises:
            FileNotFoundError: no such file, of prompts or of answers.
            ValueError: a file that holds no prompts.
        """
        for path in self.answer_files:
            if not path.is_file():
                raise FileNotFoundError(f"answers: there is no file '{path}'")
        return None if self.prompts is None else read_prompts(user_path(self.prompts, "prompts"))


@dataclass(frozen=True)
class AdapterTraining:
    """How an adapter is trained.

    Attributes:
        max_steps: optimizer steps, at most; null: 2000, or with max_minutes as many as go into them.
        max_minutes: ends training after so many minutes, validations included, and the learning rate's decay with
            it; two such runs are not the same to the bit. null: max_steps alone decides.
        batch_size: answers a step.
        lr: full learning rate of AdamW.
        warmup_steps: optimizer steps until the full rate.
        unroll: draft steps that it is trained on, each on what it made of the one before.
        decay: weight of a draft step in the loss, against the one before.
        unroll_every: draft steps after the first are trained on the drafts that begin at one position of so many.
        ema: what is kept is an average of the weights with this decay a step; null: the last weights.
        precision: of training; bf16-mixed computes the model's states in bfloat16 too, faster where the CPU can.
        val_every: optimizer steps between two validations.
        val_answers: held-out answers that a validation looks at; in the end it is all of them.
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
        check_choice("precision", self.precision, get_args(Precision))

    @property
    def steps(self) -> int:
        """-1: as many as there is time for."""
        return self.max_steps or (DEFAULT_STEPS if self.max_minutes is None else -1)
