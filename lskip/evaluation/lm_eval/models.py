"""A model's exits as models of lm-eval-harness, from the model's name."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lskip.inference import TextGenerator
from lskip.inference.drafting.drafter import Available
from lskip.inference.drafting.registry import check_fixed_exit
from lskip.inference.runners.rounded_model import int8_layouts, round_to_int8
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import ExitAdapter, load_adapter
from lskip.models.exit_heads import load_trained_exits
from lskip.models.pretrained import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lskip.evaluation.lm_eval.exit_model import ExitModel
    from lskip.models.exit_heads import TrainedExits


class Parts(NamedTuple):
    """A model as it is loaded, and what its exits are read through."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    trained: TrainedExits | None
    adapter: ExitAdapter | None


def load_parts(
    source: str, exit_layers: list[int], dtype: torch.dtype, place: torch.device, folder: Path | None
) -> Parts:
    """Return a model from whatever `--model` can name, on `place`, with the exit adapter of `folder`.

    Raises:
        ValueError: it has no tokenizer, or an adapter that reads none of the exits.
    """
    loaded, tokenizer = load_model(source, dtype)
    if tokenizer is None:
        raise ValueError(f"model: {source!r} has no tokenizer, which tasks need")
    decoder = Decoder(loaded.eval().to(place))
    trained = load_trained_exits(source, decoder)
    adapter = None if folder is None else load_adapter(folder, loaded)
    if adapter is not None:
        check_adapter(adapter, exit_layers, decoder)
    return Parts(decoder, tokenizer, trained, adapter)


def _exit_models(parts: Parts, exit_layers: list[int], batch_size: int, weights: str) -> list[ExitModel]:
    from lskip.evaluation.lm_eval.exit_model import ExitModel, ExitScorer

    decoder, tokenizer, trained, adapter = parts
    scorer = ExitScorer(decoder, exit_layers, batch_size, trained, adapter)
    through = {"trained_exits": trained, "exit_adapter": adapter}
    generator = functools.cache(lambda: TextGenerator(decoder.model, tokenizer, weights=weights, **through))
    return [ExitModel(exit_layer, scorer, generator, tokenizer, weights) for exit_layer in exit_layers]


def models_to_score(parts: Parts, exit_layers: list[int], batch_size: int, weights: str) -> Iterable[ExitModel]:
    """Return the exits as lm-eval's models, and for `weights` int8 once more of the model rounded, in place, by then.

    Raises:
        ValueError: int8 is not for this model, or does not work here.
    """
    found = _exit_models(parts, exit_layers, batch_size, "auto")
    if weights == "auto":
        return found
    int8_layouts(parts.decoder)  # refused before anything is scored

    def rounded() -> Iterator[ExitModel]:
        round_to_int8(parts.decoder)
        yield from _exit_models(parts, exit_layers, batch_size, weights)

    return itertools.chain(found, rounded())


def check_adapter(adapter: ExitAdapter, exit_layers: list[int], decoder: Decoder) -> None:
    """Raise ValueError unless the adapter reads one of the exits, for every token and without the last layer."""
    shape = adapter.shape
    if shape.exit_layer not in exit_layers:
        raise ValueError(f"exits: {shape.exit_layer}, for which the exit_adapter was made, is none of them")
    check_fixed_exit(shape.exit_layer, Available(decoder.num_layers, False, shape.exit_layer, shape.joins_last_state))
    if len(adapter.token_ids) < decoder.vocab_size:
        raise ValueError(
            f"exit_adapter: knows {len(adapter.token_ids)} of {decoder.vocab_size} tokens, and gives all others no"
            " probability; train one on the whole vocabulary (adapt --vocabulary null)"
        )
