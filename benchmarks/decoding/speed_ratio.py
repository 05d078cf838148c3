"""How many times as fast as a rival something was, with an interval by bootstrap."""

from __future__ import annotations

import random

SAMPLES = 2000


def speed_ratio(rival: list[float], own: list[float]) -> dict[str, float]:
    """Return the ratio of all seconds of paired measurements, and its 95 % interval by bootstrap over the pairs."""
    pairs, rng = list(zip(rival, own, strict=True)), random.Random(0)
    drawn = sorted(_over(rng.choices(pairs, k=len(pairs))) for _ in range(SAMPLES))
    return {"ratio": _over(pairs), "low": drawn[SAMPLES // 40], "high": drawn[-SAMPLES // 40 - 1]}


def _over(pairs: list[tuple[float, float]]) -> float:
    return sum(rival for rival, _ in pairs) / sum(own for _, own in pairs)


def in_words(found: dict[str, float]) -> str:
    return f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
