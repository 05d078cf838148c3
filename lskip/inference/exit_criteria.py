"""Exit criteria, which decide after a block whether a token goes deeper (DeeBERT, CALM, BERxiT)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from math import log
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.utils.checks import check_real, check_whole

if TYPE_CHECKING:
    from lskip.models.exit_heads import ExitClassifier, TrainedExits

Logits = Callable[[], Tensor]


class ExitCriterion(ABC):
    """Decision, after a block, which slots exit. Subclass it for a criterion of your own.

    Attributes:
        first: the first exit_layer at which it is asked. EarlyExitLoss does not train the exit after block 1
            (e(0) = 0).
        every: it is asked again after so many blocks.
        reads_probabilities: whether it needs probabilities of tokens or classes, which a regression does not have.
        compares_blocks: whether it reads `before`, which a draft does not have.
    """

    first = 2
    every = 1
    reads_probabilities = False
    compares_blocks = False

    def __init__(self, first: int = 2, every: int = 1):
        """Set the layers at which it is asked.

        Raises:
            ValueError: not whole numbers from 1 up.
        """
        check_whole("first", first, 1)
        check_whole("every", every, 1)
        self.first, self.every = first, every

    def looks_at(self, exit_layer: int) -> bool:
        """Return whether `exits` is asked at this layer; at the last that runs nobody asks, since every slot exits."""
        return exit_layer >= self.first and (exit_layer - self.first) % self.every == 0

    def bound(self, classifier: ExitClassifier | None) -> ExitCriterion:
        """Return the criterion for a model with this exit classifier (None: it has none)."""
        return self

    @abstractmethod
    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        """Return which slots exit here, each decided by its own row alone, so that texts do not depend on each other.

        Args:
            exit_layer: blocks that have run.
            before, after: [A, D], input and output of the last of these blocks. A slot that has exited already shows
                its exit state in both, and the answer for it is ignored.
            logits: decodes `after` to [A, V], before temperature and the like. The first call costs a product with
                the head, which the token's choice reuses if it is chosen here.

        Returns:
            bool [A].
        """


class MeasuredExit(ExitCriterion):
    """Exit where a measure of the logits, from 0 to 1, passes a threshold. `lskip tune` can choose that threshold.

    Attributes:
        low_is_sure: whether a token exits below the threshold; else from it up.
    """

    low_is_sure = False
    reads_probabilities = True

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """Set the threshold, in [0, 1], and the layers as ExitCriterion does."""
        super().__init__(first, every)
        self.threshold = _checked(threshold)

    @staticmethod
    @abstractmethod
    def measure(logits: Tensor) -> Tensor:
        """Return the measure [A] of logits [A, V]."""

    def sure(self, measured: Tensor) -> Tensor:
        """Return, bool [A], which of the measured values [A] are sure enough."""
        return measured < self.threshold if self.low_is_sure else measured >= self.threshold

    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        return self.sure(self.measure(logits()))


class Entropy(MeasuredExit):
    """Exit where H(softmax(z)) / ln V < threshold, from 0 (all on one token) to 1 (the uniform distribution).

    DeeBERT (Xin et al., arXiv 2004.12993), divided by ln V, so that a threshold carries between vocabularies.
    """

    low_is_sure = True

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """Set the threshold, and the layers as ExitCriterion does.

        Args:
            threshold: in [0, 1]; at 0 no token exits.
        """
        super().__init__(threshold, first, every)

    @staticmethod
    def measure(logits: Tensor) -> Tensor:
        z = logits.float()
        return torch.special.entr(z.softmax(-1)).sum(-1) / log(z.shape[-1])


class Margin(MeasuredExit):
    """Exit where the most probable token is at least `threshold` above the second in probability.

    CALM's softmax response (arXiv 2207.07061).
    """

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """Set the threshold, and the layers as ExitCriterion does.

        Args:
            threshold: in [0, 1]; at 0 every token exits at `first`.
        """
        super().__init__(threshold, first, every)

    @staticmethod
    def measure(logits: Tensor) -> Tensor:
        highest, second = logits.float().softmax(-1).topk(2, -1).values.unbind(-1)
        return highest - second


MEASURED: dict[str, type[MeasuredExit]] = {kind.__name__: kind for kind in (Entropy, Margin)}


class Saturation(ExitCriterion):
    """Exit where the last block has hardly changed the state's direction: cos(x_l, x_{l+1}) >= threshold.

    CALM's hidden-state saturation (arXiv 2207.07061). Only the exit that is taken is decoded.
    """

    compares_blocks = True

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """Set the threshold, and the layers as ExitCriterion does.

        Args:
            threshold: in [-1, 1].
        """
        super().__init__(first, every)
        self.threshold = _checked(threshold, lowest=-1)

    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        return F.cosine_similarity(before.float(), after.float(), dim=-1) >= self.threshold


class LearnedExit(ExitCriterion):
    """Exit where the model's exit classifier rates the exit right: u = sigmoid(w · h + b) >= threshold.

    BERxiT's learning to exit (Xin et al., EACL 2021). It needs a model that was trained with learned_exit: true. Only
    the exit that is taken is decoded.
    """

    def __init__(self, threshold: float, first: int = 2, every: int = 1):
        """Set the threshold, and the layers as ExitCriterion does.

        Args:
            threshold: in [0, 1]; at 0 every token exits at `first`.
        """
        super().__init__(first, every)
        self.threshold = _checked(threshold)
        self.classifier: ExitClassifier | None = None

    def bound(self, classifier: ExitClassifier | None) -> LearnedExit:
        """Return a copy that asks this exit classifier; ValueError if it is None."""
        if classifier is None:
            raise ValueError("exit_criterion: LearnedExit needs a model that was trained with learned_exit: true")
        known = copy(self)
        known.classifier = classifier
        return known

    def exits(self, exit_layer: int, before: Tensor, after: Tensor, logits: Logits) -> Tensor:
        return self.classifier(after) >= self.threshold


def bound(criterion: ExitCriterion | None, exits: TrainedExits | None) -> ExitCriterion | None:
    """Return a criterion for this model; ValueError if it needs an exit classifier that the model does not have."""
    return None if criterion is None else criterion.bound(None if exits is None else exits.classifier)


def _checked(threshold: float, lowest: int = 0) -> float:
    check_real("threshold", threshold, f"from {lowest} to 1", lambda value: lowest <= value <= 1)
    return float(threshold)
