"""An exit adapter: a small trained module between an exit of a frozen model and the model's own norm and head.

Not in the LayerSkip paper. As in Kangaroo (arXiv 2404.18911) one or two blocks transform the exit's state into one that
the head can read; as in EAGLE (arXiv 2401.15077) the last layer's state of the previous token may be a second input.
The model is frozen, so that its last layer loses nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lskip.models.block_inputs import BlockInputs
from lskip.models.decoder import Decoder
from lskip.models.reading.config import with_layers
from lskip.utils.checks import check_whole
from lskip.utils.foreign import foreign
from lskip.utils.output_files import write_json
from lskip.utils.untrusted import parse_json, read_text
from lskip.utils.user_paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE_FILE, WEIGHTS_FILE = "adapter.json", "adapter.safetensors"
# Adapters that come with lskip, by the model's name.
SHIPPED = {"smollm2": Path(__file__).parents[1] / "adapters" / "smollm2"}


@dataclass(frozen=True)
class AdapterShape:
    """The shape of an adapter.

    Attributes:
        exit_layer: blocks of the model that run before it.
        num_blocks: blocks of its own, of the model's kind.
        joins_last_state: whether its input includes the last layer's state of the previous token.

    Raises:
        ValueError: a number that is not a whole one from 1 up.
    """

    exit_layer: int
    num_blocks: int = 1
    joins_last_state: bool = True

    def __post_init__(self):
        for name in ("exit_layer", "num_blocks"):
            check_whole(name, getattr(self, name), 1)
        if not isinstance(self.joins_last_state, bool):
            raise ValueError(f"joins_last_state: {self.joins_last_state!r} is not true or false")


class ExitAdapter(nn.Module):
    """A draft model on the states of an exit: blocks, norm and head, over a part of the vocabulary.

    They form a small model of the same family (`body`), so that whatever runs a decoder runs it too. It starts as a
    copy of the model's last blocks; its head consists of rows of the model's, and is never trained or saved.

    Args:
        model: the frozen model.
        shape: its exit layer, its number of blocks, and its inputs.
        token_ids: [W], the tokens that it can predict, ascending; None: all.

    Attributes:
        made_for: `fingerprint` of the model.
        token_ids: [W], the tokens that it can predict, by row of its head.

    Raises:
        ValueError: an exit that is not below the model's last layer, or more blocks than the model has.
    """

    def __init__(self, model: PreTrainedModel, shape: AdapterShape, token_ids: Tensor | None = None):
        super().__init__()
        decoder = Decoder(model)
        check_shape(shape, decoder.num_layers)
        if decoder.head_weight.shape[1] != decoder.hidden_size:
            raise ValueError("model: an exit adapter reads states with the head itself, not through a projection (OPT)")
        self.shape, self.made_for = shape, fingerprint(decoder)
        ids = torch.arange(decoder.vocab_size) if token_ids is None else token_ids
        self.register_buffer("token_ids", ids.to(decoder.device), persistent=False)
        width = decoder.hidden_size
        self.join = nn.Linear(2 * width if shape.joins_last_state else width, width)
        self.body = body_of(decoder, shape.num_blocks, self.token_ids)
        with torch.no_grad():  # passes the exit's state through; training replaces it by `fit_join`
            self.join.weight.copy_(torch.eye(*self.join.weight.shape))
            self.join.bias.zero_()
        self.join.to(decoder.device, decoder.dtype)
        self.body.to(decoder.device)  # no dtype: its rotary frequencies must not be rounded

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return all parameters but the head's."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def take_weights(self, other: ExitAdapter) -> None:
        """Copy the weights of an adapter of the same model and shape, whose tokens may be others."""
        for mine, theirs in zip(self.trained_parameters(), other.trained_parameters(), strict=True):
            mine.copy_(theirs)

    def joined(self, exit_states: Tensor, last_states: Tensor | None) -> Tensor:
        """Return the input of its first block, [..., D].

        Args:
            exit_states: [..., D], of the model's exit, before any norm.
            last_states: [..., D], of the previous token: the last layer's after the final norm, or, for a drafted
                token, this adapter's own after `norm`. None where the shape joins none.
        """
        return self.join(side_by_side(exit_states, last_states))

    def run(self, joined: Tensor, inputs: BlockInputs) -> Tensor:
        """Return the output of its blocks, [B, S, D], for joined inputs [B, S, D]."""
        decoder, x = Decoder(self.body), joined
        for index in range(self.shape.num_blocks):
            x = decoder.block(index, x, inputs)
        return x

    def norm(self, states: Tensor) -> Tensor:
        """Return the normed states [..., D], read by its head and in place of the last layer's of a drafted token."""
        return Decoder(self.body).norm(states)

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write shape and weights, without the head, into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: part for name, part in self.named_parameters() if part.requires_grad}
        weights = {name: part.detach().to(dtype).contiguous() for name, part in trained.items()}
        # int32: the smallest type of torch that holds every vocabulary
        save_file({**weights, "token_ids": self.token_ids.int()}, folder / WEIGHTS_FILE)
        description = {**asdict(self.shape), "model": self.made_for}
        write_json(folder / SHAPE_FILE, description)


def side_by_side(exit_states: Tensor, last_states: Tensor | None) -> Tensor:
    """Return the states, each normed, side by side in [..., 2 D]; or the exit's alone, [..., D]."""
    parts = [exit_states] if last_states is None else [exit_states, last_states]
    both = torch.stack(parts, -2)
    return F.rms_norm(both, both.shape[-1:]).flatten(-2)


def find_adapter(name: str, field: str = "exit_adapter") -> Path:
    """Return the folder of an adapter: a path, or `smollm2` for the one that comes with lskip.

    Args:
        field: the setting that names it, for messages.

    Raises:
        FileNotFoundError: there is no such folder, or no adapter in it.
    """
    folder = SHIPPED.get(name) or user_path(name, field)
    if not folder.is_dir():
        raise FileNotFoundError(f"{field}: there is no folder '{name}'")
    _check_holds(folder, field)
    return folder


def _check_holds(folder: Path, field: str) -> None:
    if not (folder / SHAPE_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{field}: '{folder}' holds no {SHAPE_FILE} with {WEIGHTS_FILE}")


def load_adapter(folder: Path, model: PreTrainedModel, expected: AdapterShape | None = None) -> ExitAdapter:
    """Return the adapter that `save` wrote, on the device and in the dtype of `model`.

    Raises:
        FileNotFoundError: no adapter in `folder`.
        ValueError: it is of another model or not of the `expected` shape, or the files are damaged.
    """
    _check_holds(folder, "exit_adapter")
    with foreign(f"exit_adapter: '{folder}'"):
        description = parse_json(read_text(folder / SHAPE_FILE, "exit_adapter"), SHAPE_FILE)
        made_for, shape = description.pop("model"), AdapterShape(**description)
        weights = load_file(folder / WEIGHTS_FILE)
        token_ids = weights.pop("token_ids").long()
    if not all(part.float().isfinite().all() for part in weights.values()):
        raise ValueError(f"exit_adapter: the weights in '{folder}' are not finite (NaN or infinity): it says nothing")
    if made_for != fingerprint(Decoder(model)):
        raise ValueError(f"exit_adapter: '{folder}' was made for another model ({made_for})")
    if expected not in (None, shape):
        raise ValueError(f"exit_adapter: '{folder}' is of another shape ({shape}, not {expected})")
    known = torch.arange(made_for["vocab_size"])
    if token_ids.dim() != 1 or not len(token_ids) or not torch.isin(token_ids, known).all():
        raise ValueError(f"exit_adapter: the words in '{folder}' are none of the model's")
    try:
        adapter = ExitAdapter(model, shape, token_ids)
    except ValueError as error:
        raise ValueError(f"exit_adapter: '{folder}' is of no such model ({error})") from error
    try:
        missing, unexpected = adapter.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # of another size
        raise ValueError(f"exit_adapter: the weights in '{folder}' do not fit its shape") from error
    if unexpected or any(adapter.get_parameter(name).requires_grad for name in missing):
        raise ValueError(f"exit_adapter: the weights in '{folder}' do not fit its shape")
    return adapter.eval()


def fingerprint(decoder: Decoder) -> dict:
    """Return what identifies a model in any dtype: its sizes, and a hash of the head's first rows in bfloat16."""
    rows = decoder.head_weight[:256].detach().to("cpu", torch.bfloat16).contiguous()
    return {
        "num_layers": decoder.num_layers,
        "hidden_size": decoder.hidden_size,
        "vocab_size": decoder.vocab_size,
        "head": hashlib.sha256(rows.view(torch.int16).numpy().tobytes()).hexdigest()[:16],
    }


def check_shape(shape: AdapterShape, num_layers: int) -> None:
    """Raise ValueError unless the shape fits a model of `num_layers`."""
    if shape.exit_layer >= num_layers:
        raise ValueError(f"exit_layer: {shape.exit_layer} is not from 1 to {num_layers - 1}, below the last layer")
    if shape.num_blocks > num_layers:
        raise ValueError(f"num_blocks: {shape.num_blocks} is more than the model's {num_layers}")


def body_of(decoder: Decoder, num_blocks: int, token_ids: Tensor) -> PreTrainedModel:
    """Return a model of the decoder's last `num_blocks` blocks, its norm and the rows `token_ids` of its head."""
    config = with_layers(decoder.config, slice(decoder.num_layers - num_blocks, None))
    config.vocab_size = len(token_ids)
    config.tie_word_embeddings = True  # the embedding is not used
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None  # they may lie beyond its vocabulary
    attention = decoder.config._attn_implementation
    body = AutoModelForCausalLM.from_config(
        config, dtype=decoder.dtype, attn_implementation=attention, trust_remote_code=False
    )
    own, top = Decoder(body), decoder.blocks[decoder.num_layers - num_blocks :]
    for block, original in zip(own.blocks, top, strict=True):
        block.load_state_dict(original.state_dict())
    own.final_norm.load_state_dict(decoder.final_norm.state_dict())
    with torch.no_grad():
        own.head_weight.copy_(decoder.head_weight[token_ids])
    own.head_weight.requires_grad_(False)
    return body
