"""The check of what a policy learnt in an earlier process, as it comes from a file."""

from typing import Any

from lskip.inference.drafting.acceptance import GROUPS
from lskip.utils.checks import is_real


def check_learnt(learnt: Any) -> None:
    """Raise ValueError, in one sentence, unless it is of the form that CostAwareDraft.learnt gives."""
    if not isinstance(learnt, dict) or set(learnt) != {"drafts", "extra"}:
        raise ValueError("learnt: is not a table of drafts, extra")
    if not all(isinstance(part, dict) for part in learnt.values()):
        raise ValueError("learnt: drafts or extra is not a table")
    for draft, counts in learnt["drafts"].items():
        if not isinstance(counts, dict) or set(counts) != {"accepted", "refused"}:
            raise ValueError(f"learnt: {draft!r} is not a table of accepted, refused")
        for name, numbers in counts.items():
            if not isinstance(numbers, list) or len(numbers) != GROUPS or not all(map(_is_count, numbers)):
                raise ValueError(f"learnt: {name} of {draft!r} is not {GROUPS} numbers from 0 up")
    for draft, extra in learnt["extra"].items():
        if not isinstance(extra, list) or len(extra) != 2 or not all(map(_is_number, extra)):
            raise ValueError(f"learnt: extra of {draft!r} is {extra!r}, not two numbers")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and is_real(value)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0
