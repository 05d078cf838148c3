"""A single short request to the Hugging Face hub: whether a model or a data set exists."""

from typing import Literal

_SECONDS = 5


def hub_lacks(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Return why the hub does not serve `name`; None: it does.

    transformers and datasets would retry five times, also for a misspelled name.
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
    except Exception as error:  # of the HTTP client, which differs between versions
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        return f"the hub does not answer: {type(error).__name__}"
    return None
