"""`lskip serve`: models behind OpenAI's interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePath

from lskip.cli.generate import check_exit_layer
from lskip.evaluation.sweep.tuned import tuned_options
from lskip.inference.options import DecodingOptions, LoadingOptions
from lskip.serving.options import DRAFTING, Served, ServingOptions
from lskip.serving.server import serve_models

FORMS = "NAME=MODEL, NAME=MODEL:TASK or NAME=MODEL:exit_layer=8"
FIXED_EXIT = "exit_layer="


def serve(serving: ServingOptions, loading: LoadingOptions) -> None:
    """Serve a model to clients of OpenAI's completions and chat completions, until Ctrl-C or SIGTERM.

    Args:
        serving: where, how many texts at a time, and what drafts.
        loading: which model.
    """
    serve_models(serving, [*models_of(serving, loading)])


def models_of(serving: ServingOptions, loading: LoadingOptions) -> Iterator[Served]:
    """Yield what the options ask to serve.

    Raises:
        ValueError: an endpoint that is not of one of the forms, or a task or a layer that its model lacks.
    """
    if serving.endpoint is None:
        name = serving.name or PurePath(loading.model).name or loading.model
        yield _served(name, serving.drafting, loading)
        return
    if loading.model != LoadingOptions.model:
        raise ValueError(f"model: {loading.model!r} is not served beside endpoint; give it a NAME=MODEL there")
    names = set()
    for text in serving.endpoint:
        name, equals, place = text.partition("=")
        model, _, how = place.partition(":")
        if not (name and equals and model) or (":" in place and not how):
            raise ValueError(f"endpoint: {text!r} is not {FORMS}")
        if name in names:
            raise ValueError(f"endpoint: {name!r} is given twice")
        names.add(name)
        try:
            yield _endpoint(name, how, serving, replace(loading, model=model))
        except ValueError as error:
            raise ValueError(f"endpoint: {text!r}: {error}") from error


def _endpoint(name: str, how: str, serving: ServingOptions, loading: LoadingOptions) -> Served:
    if not how:
        return _served(name, serving.drafting, loading)
    if how.startswith(FIXED_EXIT):
        layer = how.removeprefix(FIXED_EXIT)
        if not layer.isascii() or not layer.isdecimal():
            raise ValueError(f"exit_layer: {layer!r} is not a whole number from 1 up")
        return _served(name, DecodingOptions(exit_layer=int(layer)), loading)
    return _served(name, *tuned_options(how, DecodingOptions(), loading))


def _served(name: str, decoding: DecodingOptions, loading: LoadingOptions) -> Served:
    """Return a model to serve; ValueError, before it is loaded, for drafts or an exit that cannot be."""
    settings, loading = decoding.settings(), loading.for_draft(decoding.draft)
    check_exit_layer(decoding, loading)
    return Served(name, {key: settings[key] for key in DRAFTING if key in settings}, loading)
