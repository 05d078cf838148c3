"""The interface between LayerSkipModule and the callbacks: one number for each block, set by one callback."""

from collections.abc import Sequence
from math import inf, isinf


class LayerVector:
    """A number for each block, with at most one writer.

    Args:
        name: for error messages.
        values: those without a writer.
        most: that a value may be.
    """

    def __init__(self, name: str, values: Sequence[float], most: float = inf):
        self.name = name
        self._most = most
        self._unwritten = list(values)
        self.reset()

    def reset(self) -> None:
        """Remove the writer and restore the initial values."""
        self.values = list(self._unwritten)
        self._writer: object | None = None
        self._sum = [0.0] * len(self.values)
        self._count = 0

    def claim(self, writer: object) -> None:
        """Register `writer`.

        Raises:
            ValueError: another writer is registered.
        """
        if self._writer is not None and self._writer is not writer:
            names = f"{type(self._writer).__name__} and {type(writer).__name__}"
            raise ValueError(f"callbacks: {names} both write {self.name}; keep one of them")
        self._writer = writer

    def write(self, writer: object, values: Sequence[float]) -> None:
        """Set all values for the next step.

        Raises:
            ValueError: another writer has claimed the vector, the number of values is not that of the blocks, or
                a value is negative, too large or not finite.
        """
        self.claim(writer)
        writer_name, layers = type(writer).__name__, len(self.values)
        if len(values) != layers:
            raise ValueError(f"{writer_name}: {len(values)} values for {self.name}, the model has {layers} layers")
        wrong = [value for value in values if not 0 <= value <= self._most or isinf(value)]
        if wrong:
            allowed = "finite and 0 or more" if isinf(self._most) else f"from 0 to {self._most:g}"
            raise ValueError(f"{writer_name}: {self.name} must be {allowed}, not {wrong[0]}")
        self.values = list(values)

    def count_step(self) -> None:
        """Add the current values to the mean."""
        self._sum = [total + value for total, value in zip(self._sum, self.values, strict=True)]
        self._count += 1

    def take_mean(self) -> list[float]:
        """Return the mean over the steps since the last call."""
        mean = [total / max(self._count, 1) for total in self._sum]
        self._sum, self._count = [0.0] * len(self.values), 0
        return mean
