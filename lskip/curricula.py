"""Curricula of the exits that are supervised at a step: C(t, l) of arXiv 2404.16710, section 4.2."""

from collections.abc import Iterable

from lskip.utils.checks import check_whole


class ExitCurriculum:
    """A pure function from the step to the exits that are on. Subclass it for a curriculum of your own.

    Attributes:
        needs_total: whether it depends on the number of steps of the run.
    """

    needs_total = False

    def check(self, num_layers: int) -> None:
        """Raise ValueError where the curriculum does not fit a model of `num_layers`."""

    def exits(self, num_layers: int) -> Iterable[int]:
        """Return the exit layers (1-based) that are on at some step, the last left out or not; by default all."""
        return range(1, num_layers + 1)

    def on(self, step: int, total: int, num_layers: int) -> list[bool]:
        """Return C(t, ·), one entry for each layer, at optimizer step `step` (0-based) of `total`.

        The last exit is always on. The paper does not say so, but otherwise most steps would not train the layer that
        verifies drafts.
        """
        self.check(num_layers)
        last = num_layers - 1
        return [block == last or self.is_on(step, total, block, num_layers) for block in range(num_layers)]

    def is_on(self, step: int, total: int, block: int, num_layers: int) -> bool:
        """Return C(t, l) for the exit after block `block` (0-based), other than the last."""
        raise NotImplementedError


class Rotational(ExitCurriculum):
    """Exit l is on when (l - t) mod period = 0: one exit in `period` at each step, in turn.

    Args:
        period: R of the paper, steps until the same exit is on again; at least 1 (1: all exits at every step).
    """

    def __init__(self, period: int = 8):
        check_whole("period", period, 1)
        self.period = period

    def is_on(self, step: int, total: int, block: int, num_layers: int) -> bool:
        return (block - step) % self.period == 0


class Gradual(ExitCurriculum):
    """Exits join from the last down, exit l from step (L - 1 - l) T / (2 L) on: all are on after half the run."""

    needs_total = True

    def is_on(self, step: int, total: int, block: int, num_layers: int) -> bool:
        return 2 * num_layers * step >= (num_layers - 1 - block) * total


class AllExits(ExitCurriculum):
    """Every exit at every step, at the cost of a product with the LM head for each."""

    def is_on(self, step: int, total: int, block: int, num_layers: int) -> bool:
        return True


class LastExit(ExitCurriculum):
    """The last exit only: ordinary language-model training."""

    def exits(self, num_layers: int) -> Iterable[int]:
        return ()

    def is_on(self, step: int, total: int, block: int, num_layers: int) -> bool:
        return False


class ChosenExits(ExitCurriculum):
    """Only the exits that decoding will use, in turn: at step t number t mod n of n.

    Args:
        exit_layers: 1-based, each from 2 to the last but one of the model (the exit after layer 1 weighs 0).

    Raises:
        ValueError: no exit, or one below 2; at the start of training, one that the model does not have.
    """

    def __init__(self, exit_layers: list[int]):
        if not exit_layers:
            raise ValueError("exit_layers: [] names no exit; for none there is LastExit")
        for exit_layer in exit_layers:
            check_whole("exit_layers", exit_layer, 2)
        self.exit_layers = list(exit_layers)

    def check(self, num_layers: int) -> None:
        deepest = max(self.exit_layers)
        if deepest >= num_layers:
            raise ValueError(f"exit_layers: {deepest} is not from 2 to {num_layers - 1}, below the last layer")

    def exits(self, num_layers: int) -> Iterable[int]:
        return self.exit_layers

    def is_on(self, step: int, total: int, block: int, num_layers: int) -> bool:
        return block + 1 == self.exit_layers[step % len(self.exit_layers)]
