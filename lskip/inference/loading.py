"""Loading: from the name of a model to one ready for decoding."""

import torch

from lskip.inference.drafting.costs_file import cached_costs_file, check_costs_file, digest_of
from lskip.inference.generator import TextGenerator
from lskip.inference.runners.build import resolve_draft_weights
from lskip.inference.runners.fused_blocks import obstacle
from lskip.inference.settings import AUTO
from lskip.models.decoder import Decoder
from lskip.models.draft_tokens import ALL, find_draft_tokens
from lskip.models.exit_adapter import SHIPPED, find_adapter, load_adapter
from lskip.utils.checks import check_choice, check_whole
from lskip.utils.devices import DTYPES
from lskip.utils.user_paths import user_path


def load_generator(
    model: str = "smollm2",
    dtype: str = "float32",
    weights: str = "auto",
    draft_weights: str | None = None,
    device: str = "auto",
    bit_exact: bool | None = None,
    costs_file: str | None = "auto",
    exit_adapter: str | None = None,
    batch_size: int = 1,
    draft_tokens: str | None = None,
) -> TextGenerator:
    """Return a generator from whatever `--model` can name.

    Args:
        model: "smollm2", a run, a checkpoint, a folder, a hub name, a GGUF file.
        dtype: "float32", "bfloat16" or "float16".
        weights, draft_weights, bit_exact, batch_size: as in TextGenerator. Where draft_weights is "auto", none work
            here and no exit_adapter is named, the one that comes with lskip for this model is loaded.
        device: "cpu", "cuda", …; "auto": a GPU where there is one.
        costs_file: as in TextGenerator; "auto": one in ~/.cache/lskip/costs of this model as it is loaded here.
        exit_adapter: the folder of an exit adapter that was trained for this model, or "smollm2", the one that comes
            with lskip; None: none.
        draft_tokens: a JSON file of the tokens that drafts of layers and of weights choose among; "all"; None: the file
            that `lskip fit` kept beside the checkpoint, else all.

    Raises:
        ValueError, FileNotFoundError: what is wrong with an argument, or that there is no such model.
    """
    # These bring the GGUF reader and the hub client: only when loading.
    from lskip.models.exit_heads import load_trained_exits
    from lskip.models.pretrained import load_model

    _check(dtype, batch_size, costs_file, draft_tokens, draft_weights is None and exit_adapter is not None)
    folder = None if exit_adapter is None else find_adapter(exit_adapter)
    place = resolve_device(device)
    listed = find_draft_tokens(draft_tokens, model)
    loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
    decoder = Decoder(loaded.eval().to(place))
    asked, draft_weights = draft_weights, resolve_draft_weights(draft_weights, weights, decoder, batch_size)
    if asked == AUTO and draft_weights is None and model in SHIPPED:
        folder = folder or find_adapter(model)
    adapter = None if folder is None else load_adapter(folder, loaded)
    few = None if listed is None else listed.ids(decoder.vocab_size, tokenizer)
    if costs_file == AUTO:
        how = [dtype, weights, bit_exact, batch_size, draft_weights, adapter and adapter.shape, few, obstacle(decoder)]
        costs_file = cached_costs_file([digest_of(loaded.state_dict()), *how], place)
    return TextGenerator(
        loaded,
        tokenizer,
        weights=weights,
        draft_weights=draft_weights,
        release_model=True,
        bit_exact=bit_exact,
        costs_file=costs_file,
        exit_adapter=adapter,
        trained_exits=load_trained_exits(model, decoder),
        batch_size=batch_size,
        draft_tokens=few,
    )


def _check(dtype: str, batch_size: int, costs_file: str | None, draft_tokens: str | None, adapter_alone: bool) -> None:
    """Raise ValueError or OSError for values and files that cannot be used, before a model is loaded."""
    check_choice("dtype", dtype, DTYPES)
    check_whole("batch_size", batch_size, 1)
    if costs_file not in (None, AUTO):
        check_costs_file(user_path(costs_file, "costs_file"))
    if adapter_alone and draft_tokens not in (None, ALL):
        raise ValueError(f"draft_tokens: {draft_tokens!r} is not for the exit_adapter, which has tokens of its own")


def resolve_device(device: str) -> torch.device:
    """Return the device; ValueError unless torch knows it and this machine has it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device: {device!r} cannot be used here; try 'auto' or 'cpu'") from error
    return torch.device(device)
