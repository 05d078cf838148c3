"""Trained parts of the exits beside the model: an affine map for each exit, and one exit classifier for all.

They train with the model or on a frozen one. They are saved in its checkpoint, or in exits.safetensors in the folder
that `lskip export` writes; the model itself stays an ordinary one.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lskip.losses import rows_at_once
from lskip.models.checkpoint import check_checksums, read_checkpoint
from lskip.models.decoder import Decoder
from lskip.models.reading.shards import read_tensors
from lskip.models.reading.sources import find_source
from lskip.utils.foreign import foreign

EXITS_FILE = "exits.safetensors"
IN_CHECKPOINT = "exits."  # LayerSkipModule.exits


class ExitClassifier(nn.Module):
    """The learned exit of BERxiT (Xin et al., EACL 2021): u = sigmoid(w · h + b), one linear layer for all exits.

    u estimates, from 0 to 1, how right the exit with state h is. h is the state divided by its root mean square, since
    norms grow with depth and would tell nothing else. (BERT norms its states. BERxiT's code stores 1 - u.)
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)  # u = 0.5 before training
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return u [...], at least float32, for exit states [..., D] before any norm."""
        normed = F.rms_norm(states.to(torch.promote_types(states.dtype, torch.float32)), states.shape[-1:])
        return F.linear(normed, self.linear.weight.to(normed), self.linear.bias.to(normed)).squeeze(-1).sigmoid()

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of u against targets [...] in [0, 1].

        The states get no gradient from it, so that exits do not learn to look right. (Our choice.)
        """
        return F.mse_loss(self(states.detach()), targets.detach().to(torch.float32))


def closeness(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - tanh|prediction - target|, BERxiT's target for regression, where an error of 1 is large."""
    return 1 - (predictions - targets).abs().tanh()


class ExitHeads(nn.Module):
    """An affine map of the state for each exit but the last, before the shared norm and head.

    This is the tuned lens (Belrose et al., arXiv 2303.08112), in place of DeeBERT's classifier for each layer: a head
    over the vocabulary for each exit would be larger than a small model. It starts as the identity.
    """

    def __init__(self, num_layers: int, width: int):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers - 1))
        for affine in self.maps:
            nn.init.eye_(affine.weight)
            nn.init.zeros_(affine.bias)

    def forward(self, exit_layer: int, states: Tensor) -> Tensor:
        """Return the states [..., D] of an exit as norm and head read them; the last layer's are unchanged."""
        return states if exit_layer > len(self.maps) else self.maps[exit_layer - 1](states)


class TrainedExits(nn.Module):
    """Affine maps of the exits, or an exit classifier, or both.

    Attributes:
        heads: ExitHeads; None: the shared norm and head read the exits directly.
    """

    def __init__(self, num_layers: int, width: int, heads: bool, classifier: bool):
        super().__init__()
        self.heads = ExitHeads(num_layers, width) if heads else None
        self.certainty = ExitClassifier(width) if classifier else None  # the name is a key of checkpoints

    @property
    def classifier(self) -> ExitClassifier | None:
        """The exit classifier, if there is one."""
        return self.certainty

    def translate(self, exit_layer: int, states: Tensor) -> Tensor:
        """Return the states [..., D] of an exit as norm and head read them."""
        return states if self.heads is None else self.heads(exit_layer, states)

    def classifier_loss(self, decoder: Decoder, exit_layer: int, states: Tensor, labels: Tensor) -> Tensor | None:
        """Return BERxiT's loss of u against [argmax z = y] at N positions of one exit.

        Args:
            states: [N, D], before any norm.
            labels: [N].

        Returns:
            A scalar; None without a classifier, for the last exit, and where N is 0.
        """
        if self.classifier is None or exit_layer == decoder.num_layers or len(states) == 0:
            return None
        right = predictions(decoder, self.translate(exit_layer, states)) == labels
        return self.classifier.loss(states, right)

    def save(self, folder: Path) -> None:
        """Write exits.safetensors into `folder`."""
        save_file({name: part.contiguous() for name, part in self.state_dict().items()}, folder / EXITS_FILE)


@torch.no_grad()
def predictions(decoder: Decoder, states: Tensor) -> Tensor:
    """Return the argmax token [N] of states [N, D], with the logits of one chunk at a time."""
    parts = states.split(rows_at_once(decoder.vocab_size, states.device))
    return torch.cat([decoder.decode(part).argmax(-1) for part in parts])


def load_trained_exits(source: str, decoder: Decoder) -> TrainedExits | None:
    """Return the trained exits saved with the model that `source` (as --model) names; None where there are none.

    They are on the device and in the dtype of `decoder`. Raises ValueError if they do not fit it, and as `find_source`
    does.
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
        check_checksums(weights, path)
        return read_tensors(weights)
    path = Path(found.place) / EXITS_FILE if found.kind == "folder" else None
    if found.kind == "hub":
        try:
            path = Path(hf_hub_download(found.place, EXITS_FILE))
        except EntryNotFoundError:  # the usual case: no trained exits
            return {}
    if path is None or not path.is_file():
        return {}
    with foreign(f"model: '{path}'"):
        return load_file(path)


def rebuilt(weights: Mapping[str, Tensor], decoder: Decoder, source: str) -> TrainedExits:
    """Return the trained exits of these weights; raise ValueError if they are of another model."""
    kinds = {name.partition(".")[0] for name in weights}
    exits = TrainedExits(decoder.num_layers, decoder.hidden_size, "heads" in kinds, "certainty" in kinds)
    try:
        exits.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model: the exits in {source!r} do not fit the model") from error
    return exits.to(decoder.device, decoder.dtype)


def trained_exits(source, decoder: Decoder, heads: bool, classifier: bool) -> TrainedExits | None:
    """Return the trained exits saved with `source`, if that is a name, and new ones of what else is asked for.

    None where that is nothing.
    """
    own = load_trained_exits(source, decoder) if isinstance(source, str) else None
    has = (own is not None and own.heads is not None, own is not None and own.classifier is not None)
    wanted = heads or has[0], classifier or has[1]
    if wanted == has:
        return own
    exits = TrainedExits(decoder.num_layers, decoder.hidden_size, *wanted).to(decoder.device, decoder.dtype)
    if own is not None:
        exits.load_state_dict(own.state_dict(), strict=False)
    return exits


def mean_loss(losses: list[Tensor | None]) -> Tensor | float:
    """Return the mean of the losses of exits that are not None; 0 where all are."""
    there = [loss for loss in losses if loss is not None]
    return sum(there) / len(there) if there else 0.0
