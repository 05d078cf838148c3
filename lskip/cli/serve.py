"""`lskip serve`: a model behind OpenAI's interface."""

from lskip.inference.options import LoadingOptions
from lskip.serving.options import ServingOptions
from lskip.serving.server import serve_model


def serve(serving: ServingOptions, loading: LoadingOptions) -> None:
    """Serve a model to clients of OpenAI's completions and chat completions, until Ctrl-C or SIGTERM.

    Args:
        serving: where, how many texts at a time, and what drafts.
        loading: which model.
    """
    serve_model(serving, loading)
