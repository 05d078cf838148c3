"""Early exit without verification: each token goes as deep as a criterion asks, and its text is another one.

Other than at a fixed exit, tokens of one text differ in depth. One that has exited leaves no states above its exit
for later tokens to attend to. There its exit state stands in: blocks above the exit make their keys and values of it
(CALM, Schuster et al., arXiv 2207.07061).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from functools import cache
from math import log
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.checks import check_real, check_whole
from lskip.inference.engine import Chooser, Lanes, Round, Step, nothing_drafted
from lskip.inference.headed_step import read_at

if TYPE_CHECKING:
    from lskip.learned_exit import ExitCertainty
    from lskip.trained_exits import TrainedExits

Logits = Callable[[], Tensor]


class ExitCriterion(ABC):
    """Decides after a block which lanes go no deeper. Subclass it for a criterion of your own.

    Attributes:
        first: the first exit_layer at which it looks. EarlyExitLoss does not train the exit after block 1 (e(0) = 0).
        every: it looks again after so many blocks.
        reads_probabilities: whether it needs a choice among tokens or classes; a regression has none.
        compares_blocks: whether it looks at `before`, which a draft does not have.
    """

    first = 2
    every = 1
    reads_probabilities = False
    compares_blocks = False

    def __init__(self, first: int = 2, every: int = 1):
        """Raises:
        ValueError: not whole numbers from 1 up.
        """
        check_whole("first", first, 1)
        check_whole("every", every, 1)
        self.first, self.every = first, every

    def looks_at(self, exit_layer: int) -> bool:
        """Whether `exits` is asked there. At the last layer that may run it is not: every lane exits."""
        return exit_layer >= self.first and (exit_layer - self.first) % self.every == 0

    def bound(self, certainty: ExitCertainty | None) -> ExitCriterion:
        """Itself for a model that learned this judge (None: the model has none)."""
        return self

    @abstractmethod
    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        """Which lanes exit here. Each answer must come of the lane's own row, so that texts do not meet.

        Args:
            exit_layer: blocks that have run.
            before, after: [A, D], the states that went into the last of them and came out. A lane that has exited
                shows the state that it exited with; what is said of it does not matter.
            logits: decodes `after` to [A, V], before temperature and the like. It costs a head product at the first
                call, and nothing if the token is chosen here.

        Returns:
            bool [A].
        """


class Entropy(ExitCriterion):
    """Exit where H(softmax(z)) / ln V < threshold: 0 is certainty, 1 the uniform distribution.

    DeeBERT (Xin et al., arXiv 2004.12993), divided by ln V, so that a threshold carries between vocabularies.
    """

    reads_probabilities = True

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """threshold: in [0, 1]; at 0 no token exits. The rest as in ExitCriterion."""
        super().__init__(first, every)
        check_real("threshold", threshold, "from 0 to 1", lambda value: 0 <= value <= 1)
        self.threshold = float(threshold)

    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        z = logits().float()
        return torch.special.entr(z.softmax(-1)).sum(-1) / log(z.shape[-1]) < self.threshold


class Margin(ExitCriterion):
    """Exit where the likeliest token's probability is at least `threshold` above the second's.

    CALM's softmax response (arXiv 2207.07061).
    """

    reads_probabilities = True

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """threshold: in [0, 1]; at 0 every token exits at `first`. The rest as in ExitCriterion."""
        super().__init__(first, every)
        check_real("threshold", threshold, "from 0 to 1", lambda value: 0 <= value <= 1)
        self.threshold = float(threshold)

    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        likeliest, second = logits().float().softmax(-1).topk(2, -1).values.unbind(-1)
        return likeliest - second >= self.threshold


class Saturation(ExitCriterion):
    """Exit where the last block has hardly turned the state: cos(x_l, x_{l+1}) >= threshold.

    CALM's hidden-state saturation (arXiv 2207.07061). Only the exit that is taken is decoded.
    """

    compares_blocks = True

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """threshold: in [-1, 1]. The rest as in ExitCriterion."""
        super().__init__(first, every)
        check_real("threshold", threshold, "from -1 to 1", lambda value: -1 <= value <= 1)
        self.threshold = float(threshold)

    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        return F.cosine_similarity(before.float(), after.float(), dim=-1) >= self.threshold


class LearnedExit(ExitCriterion):
    """Exit where the model's own judge says that the exit is right: u = sigmoid(w · h + b) >= threshold.

    BERxiT's learning to exit (Xin et al., EACL 2021). It needs a model that was trained with learned_exit: true. Only
    the exit that is taken is decoded.
    """

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """threshold: in [0, 1]; at 0 every token exits at `first`. The rest as in ExitCriterion."""
        super().__init__(first, every)
        check_real("threshold", threshold, "from 0 to 1", lambda value: 0 <= value <= 1)
        self.threshold = float(threshold)
        self.certainty: ExitCertainty | None = None

    def bound(self, certainty: ExitCertainty | None) -> LearnedExit:
        """A copy that asks this judge.

        Raises:
            ValueError: there is none.
        """
        if certainty is None:
            raise ValueError("exit_criterion: LearnedExit needs a model that was trained with learned_exit: true")
        known = copy(self)
        known.certainty = certainty
        return known

    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        return self.certainty(after) >= self.threshold


def exit_round(
    step: Step,
    lanes: Lanes,
    criterion: ExitCriterion,
    full: int,
    chooser: Chooser,
    trained: TrainedExits | None = None,
) -> tuple[Round, list[int]]:
    """Adds one token to each lane, chosen at its own exit: the last of `full` blocks where the criterion names none.

    Args:
        trained: what the exits have of their own.

    Returns:
        The round, and the blocks that each lane's token ran.
    """
    logits, depths = descend(step, lanes, criterion, full, trained)
    _, lanes.pending = chooser.settle(logits()[:, None], nothing_drafted(lanes).ids)
    tokens = lanes.pending.tolist()
    for lane in range(len(tokens)):
        lanes.cache.lengths[lane] += 1
    nothing = [0] * len(tokens)
    return Round([[token] for token in tokens], nothing, nothing), depths


def descend(
    step: Step, lanes: Lanes, criterion: ExitCriterion, full: int, trained: TrainedExits | None = None
) -> tuple[Logits, list[int]]:
    """Runs the pending tokens block by block until all have exited, and fills the cache above.

    All lanes go through the blocks while one does: a few rows cost about what one does. One that has exited meets
    each with its exit state, of which the block's keys and values are made, and keeps that state.

    Returns:
        Logits of the exits [A, V], and how many blocks each lane ran.
    """
    starts = lanes.starts
    x = step.embed(lanes.pending[:, None], starts)
    logits, depths = exit_logits(step, x), [full] * len(starts)
    gone = torch.zeros(len(starts), dtype=torch.bool, device=x.device)
    for exit_layer in range(1, full + 1):
        before, x = x, step.run(x, lanes.cache, starts, exit_layer - 1, exit_layer)
        x = torch.where(gone[:, None, None], before, x)
        logits = exit_logits(read_at(step, trained, exit_layer), x)
        if exit_layer == full or not criterion.looks_at(exit_layer):
            continue
        gone = gone | criterion.exits(exit_layer, before[:, 0], x[:, 0], logits)
        depths = [min(depth, exit_layer) if out else depth for depth, out in zip(depths, gone.tolist(), strict=True)]
        if max(depths) <= exit_layer:
            step.fill(x, lanes.cache, starts, exit_layer, full)
            break
    return logits, depths


def exit_logits(step: Step, x: Tensor) -> Logits:
    """Decodes x [A, 1, D] to [A, V] when first asked, and only then."""
    return cache(lambda: step.decode(x)[:, 0])
