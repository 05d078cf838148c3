"""Asks the Hugging Face hub, once and for seconds, whether it has a model or a data set."""

from __future__ import annotations

from typing import Literal

_SECONDS = 5


def hub_lacks(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Return why the hub does not give what `name` says; None: it does.

    transformers and datasets ask five times and longer, also about a misspelled name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        return "no such name there"
    except GatedRepoError:
        return "access to it must be asked for there"
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except (HfHubHTTPError, OSError) as error:
        return f"the hub does not answer: {type(error).__name__}"
    except Exception as error:  # of the HTTP client, which is another from version to version
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        return f"the hub does not answer: {type(error).__name__}"
    return None
