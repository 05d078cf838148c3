"""The layer at which each token of an answer was settled, in one pass of the model."""

from __future__ import annotations

import torch

from lskip.inference import TextGenerator
from lskip.inference.layers.kv_cache import PREFILL_ROWS, KVCache
from lskip.inference.text import encode_prompt


@torch.inference_mode()
def settling_layers(
    generator: TextGenerator, messages: list[dict[str, str]], tokens: list[int], context: int
) -> list[int]:
    """Return for each token the first layer from which on all layers predict what the last one does (`lskip inspect`).

    Args:
        messages: of a chat, which the tokens answer.
        tokens: of the answer.
        context: tokens that both may have together.

    Raises:
        ValueError: there are too many, or one is not the model's.
    """
    prompt = encode_prompt(messages, generator.tokenizer, None, generator.vocab_size, generator.most_characters)
    if len(prompt) + len(tokens) > context:
        raise ValueError(f"tokens: {len(prompt) + len(tokens)}, the prompt's among them; allowed: {context}")
    if max(tokens) >= generator.vocab_size:
        raise ValueError(f"tokens: {max(tokens)} is not below {generator.vocab_size}")
    text = torch.tensor([[*prompt, *tokens[:-1]]], device=generator.runner.device)
    cache, first = generator.runner.new_cache(1, text.shape[1]), len(prompt) - 1
    return [
        layer
        for start, rows in zip(range(0, text.shape[1], PREFILL_ROWS), text.split(PREFILL_ROWS, dim=1), strict=True)
        for layer in _settled(generator, cache, rows, start, max(first - start, 0))
    ]


def _settled(generator: TextGenerator, cache: KVCache, rows: torch.Tensor, start: int, first: int) -> list[int]:
    """Run the rows [1, n] of one piece, and return the settling layers of those from `first` on."""
    runner, said = generator.runner, []
    x = runner.embed(rows, [start])
    for block in range(generator.num_layers):
        x = runner.run(x, cache, [start], block, block + 1)
        if first < x.shape[1]:
            said.append(runner.decode(x[:, first:])[0].argmax(-1))
    if not said:
        return []
    differs = torch.stack(said) != said[-1]
    layers = torch.arange(1, generator.num_layers + 1, device=x.device)[:, None]
    return ((differs * layers).amax(0) + 1).tolist()
