"""Early checks of the options of a training that need neither its model nor its data."""

from jsonargparse import Namespace

from lskip.cli.runs.trainer_checks import check_trainer
from lskip.utils.untrusted import parse_yaml


def check_options(config: Namespace) -> None:
    """Raise ValueError for an option that makes no sense; values of a model's config that came as text are parsed."""
    if config.get("weights_only") is False:
        raise ValueError("weights_only: false is not allowed: a checkpoint's own code is never run")
    if isinstance(config.model, str) and config.model.lstrip()[:1] in ("{", "["):
        # A malformed mapping, or a list, which would be taken for a name.
        parse_yaml(config.model, "model: the value")
        raise ValueError(f"model: {config.model[:40]!r} is neither a name nor a transformers config")
    if isinstance(config.model, dict):
        # Flags such as --model.hidden_size 64 arrive as text.
        plain = {key: parse_yaml(value, "model") for key, value in config.model.items() if isinstance(value, str)}
        config.model = {**config.model, **plain}
    check_trainer(config.trainer)
