"""What exits may have of their own beside the model: an affine map each, and one judge of all of them.

They are trained with the model or behind a frozen one, and lie in its checkpoint, or in exits.safetensors in the
folder that `lskip export` writes; the model itself stays an ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lskip.losses import rows_at_once
from lskip.models.checkpoint import verify
from lskip.models.decoder import Decoder
from lskip.models.pretrained import find_source, read_checkpoint
from lskip.utils.foreign import foreign

EXITS_FILE = "exits.safetensors"
IN_CHECKPOINT = "exits."  # LayerSkipModule.exits


class ExitCertainty(nn.Module):
    """u = sigmoid(w · h + b), one linear layer shared by all exits: how right the exit with state h is, from 0 to 1.

    h is the exit's state over its root mean square: states of a decoder grow from block to block, which would tell
    the depth alone. (BERxiT's states are normed by BERT. Its code stores 1 - u.)
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)  # at first it knows nothing: u = 0.5
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D], the exit's state before any norm -> u [...], at least float32."""
        normed = F.rms_norm(states.to(torch.promote_types(states.dtype, torch.float32)), states.shape[-1:])
        return F.linear(normed, self.linear.weight.to(normed), self.linear.bias.to(normed)).squeeze(-1).sigmoid()

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error of u against targets [...] in [0, 1].

        The states are not trained by it: an exit shall be right, not look as if it were. (Our choice.)
        """
        return F.mse_loss(self(states.detach()), targets.detach().to(torch.float32))


def closeness(predictions: Tensor, targets: Tensor) -> Tensor:
    """How right numbers are: 1 - tanh|prediction - target|, BERxiT's for regression; errors of 1 are large ones."""
    return 1 - (predictions - targets).abs().tanh()


class ExitHeads(nn.Module):
    """An affine map of an exit's state for each exit but the last, before the shared norm and head.

    It is the tuned lens (Belrose et al., arXiv 2303.08112), and stands for DeeBERT's classifier of each layer: a head
    over the whole vocabulary for each exit would be larger than a small model is. At first it is the identity.
    """

    def __init__(self, num_layers: int, width: int):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers - 1))
        for affine in self.maps:
            nn.init.eye_(affine.weight)
            nn.init.zeros_(affine.bias)

    def forward(self, exit_layer: int, states: Tensor) -> Tensor:
        """[..., D] of an exit -> [..., D], which norm and head read. The last layer's stay as they are."""
        return states if exit_layer > len(self.maps) else self.maps[exit_layer - 1](states)


class TrainedExits(nn.Module):
    """Affine maps, or a judge, or both.

    Attributes:
        heads: ExitHeads or None: the shared norm and head read the exits as they are.
        certainty: ExitCertainty or None.
    """

    def __init__(self, num_layers: int, width: int, heads: bool, certainty: bool):
        super().__init__()
        self.heads = ExitHeads(num_layers, width) if heads else None
        self.certainty = ExitCertainty(width) if certainty else None

    def translate(self, exit_layer: int, states: Tensor) -> Tensor:
        """The states [..., D] of an exit as norm and head take them."""
        return states if self.heads is None else self.heads(exit_layer, states)

    def judge_loss(self, decoder: Decoder, exit_layer: int, states: Tensor, labels: Tensor) -> Tensor | None:
        """BERxiT's loss of one exit: u against [argmax z = y] at N positions; None where nobody judges it.

        Args:
            states: [N, D], before any norm.
            labels: [N].
        """
        if self.certainty is None or exit_layer == decoder.num_layers or len(states) == 0:
            return None
        right = predictions(decoder, self.translate(exit_layer, states)) == labels
        return self.certainty.loss(states, right)

    def save(self, folder: Path) -> None:
        """Writes exits.safetensors."""
        save_file({name: part.contiguous() for name, part in self.state_dict().items()}, folder / EXITS_FILE)


@torch.no_grad()
def predictions(decoder: Decoder, states: Tensor) -> Tensor:
    """The likeliest token at each of N states [N, D]; a chunk of the logits at a time."""
    parts = states.split(rows_at_once(decoder.vocab_size, states.device))
    return torch.cat([decoder.decode(part).argmax(-1) for part in parts])


def load_trained_exits(source: str, decoder: Decoder) -> TrainedExits | None:
    """What the model that `source` names (as --model does) brings for its exits, on its device and in its dtype.

    Returns None where it brings nothing. Raises ValueError if it does not fit the model, and as `find_source` does.
    """
    weights = _saved(source)
    return rebuilt(weights, decoder, source) if weights else None


def _saved(source: str) -> dict[str, Tensor]:
    found = find_source(source)
    if found.kind == "checkpoint":
        path = Path(found.place)
        saved = read_checkpoint(path)["state_dict"]
        weights = {
            key.removeprefix(IN_CHECKPOINT): part for key, part in saved.items() if key.startswith(IN_CHECKPOINT)
        }
        verify(weights, path)
        return weights
    path = Path(found.place) / EXITS_FILE if found.kind == "folder" else None
    if found.kind == "hub":
        try:
            path = Path(hf_hub_download(found.place, EXITS_FILE))
        except EntryNotFoundError:  # the usual: no exits of its own
            return {}
    if path is None or not path.is_file():
        return {}
    with foreign(f"model: '{path}'"):
        return load_file(path)


def rebuilt(weights: Mapping[str, Tensor], decoder: Decoder, source: str) -> TrainedExits:
    """The exits that have these weights; ValueError if they are not for this model."""
    kinds = {name.partition(".")[0] for name in weights}
    exits = TrainedExits(decoder.num_layers, decoder.hidden_size, "heads" in kinds, "certainty" in kinds)
    try:
        exits.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model: the exits in {source!r} do not fit the model") from error
    return exits.to(decoder.device, decoder.dtype)


def trained_exits(source, decoder: Decoder, heads: bool, certainty: bool) -> TrainedExits | None:
    """What `source` brings for its exits if it is a name, with what else is asked for; None if that is nothing."""
    own = load_trained_exits(source, decoder) if isinstance(source, str) else None
    has = (own is not None and own.heads is not None, own is not None and own.certainty is not None)
    wanted = heads or has[0], certainty or has[1]
    if wanted == has:
        return own
    exits = TrainedExits(decoder.num_layers, decoder.hidden_size, *wanted).to(decoder.device, decoder.dtype)
    if own is not None:
        exits.load_state_dict(own.state_dict(), strict=False)
    return exits
