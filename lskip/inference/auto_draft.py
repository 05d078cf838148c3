"""The draft "auto": settings with which a policy chooses among all that is loaded."""

from collections.abc import Callable
from dataclasses import replace

from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.settings import AUTO, GenerationSettings


def with_auto_draft(
    settings: GenerationSettings, policy: Callable[[], DraftPolicy], draft_weights: str | None
) -> GenerationSettings:
    """Return the settings, with a policy in place of the draft "auto" and what else they leave open.

    Args:
        policy: returns the one to take where none is named.
        draft_weights: those of the generator; a copy in 4 bits of 4-bit weights hardly errs, so it may draft more.
    """
    if settings.draft != AUTO:
        return settings
    most = settings.num_speculations or (16 if draft_weights == "int4" else 12)
    chosen = settings.draft_policy or policy()
    return replace(settings, draft=None, draft_policy=chosen, num_speculations=most)
