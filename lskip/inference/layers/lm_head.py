"""The argmax of a large head without all its logits: a rounded copy of it rules out all but a few tokens, exactly."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lskip.inference.layers.layout_choice import obstacle_to
from lskip.inference.layers.linear import ROUNDED, Plain
from lskip.inference.layers.quantized import ROWS_AT_ONCE, round_to_int8
from lskip.inference.layers.rotation import Rotation
from lskip.inference.layers.torchscript import scripted
from lskip.models.decoder import Decoder

FEWEST_NUMBERS = 2**24  # of a head that is worth it: beside a smaller one, what else there is to do takes as long
MOST_LEFT = 1 / 8  # of all tokens: their products, here and there in memory, take as long as those of all
COPIED_AT_ONCE = 1024  # of the tokens left: larger copies, each of its own size, leave holes in the heap
SLACK = 1.001  # on bounds that hold for real numbers, for arithmetic in float32


Ban = Callable[[Tensor], None]  # is given logits [A, n, V] and makes -inf of what may not be chosen


def screen_product(x: Tensor, packed: tuple[torch.classes.quantized.LinearPackedParamsBase]) -> Tensor:
    return torch.ops.quantized.linear_dynamic(x, packed[0], False)  # False: inputs in all 8 bits


class ScreenInt8(Plain):
    """Weights on 129 levels, a scale a row, and inputs on 256, one scale for all; multiplied as whole numbers.

    AVX2 adds two products in 16 bits: with so few levels no sum leaves them, so that it is off by rounding alone.
    FBGEMM's kernel, x86 alone.
    """

    levels = 64
    inner_dtype = torch.float32
    error = ROUNDED
    product = staticmethod(screen_product)

    def __init__(self, weight: Tensor):
        """Round weight [out, in]."""
        rounded, scale = round_to_int8(weight, self.levels)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        self.shape = weight.shape
        with warnings.catch_warnings():  # torch means to drop this kind of tensor; `obstacle_to` will tell
            warnings.filterwarnings("ignore", message=".*quantize", category=UserWarning)
            matrix = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zeros, 0)
        self.packed = (torch.ops.quantized.linear_prepack(matrix, None),)

    def __call__(self, x: Tensor) -> Tensor:
        return scripted(self.product)(x.float(), self.packed)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() + 4 * self.shape[0]


class ScreenedHead:
    """argmax over tokens t of <w_t, x>, from products of rounded numbers and a few exact ones.

    With w' and x' for the rounded w and x, by Cauchy-Schwarz

        |<w, x> - <w', x'>| <= |w - w'| |x| + |w'| |x - x'|.

    A token whose upper bound is under another's lower bound is out. Of a trained model's some tens are left, when both
    are rotated before they are rounded (rotation.py), and multiplied in the head's own numbers. On a CPU that takes a
    quarter (one row) to two fifths (eight) of the whole head's time.
    """

    def __init__(self, weight: Tensor):
        """Keep the head's weight [V, D], without a copy, and round one: a quarter of its bytes in float32."""
        self.weight, self.rotation = weight, Rotation(weight.shape[1])
        rotated = [self.rotation.rotate(part) for part in weight.split(ROWS_AT_ONCE)]
        self.error, self.size = map(torch.cat, zip(*map(bounds_of, rotated), strict=True))
        self.rounded = ScreenInt8(torch.cat(rotated))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rounded head's logits [N, V] of normed states [N, D]: a draft's, where tokens are sampled."""
        return self.rounded(self.rotation.rotate(x))

    def argmax(self, x: Tensor, ban: Ban | None = None) -> Tensor | None:
        """Return the argmax [A, n] of normed states [A, n, D], float32, of what `ban` leaves; the first of equals.

        None where too few tokens are out for this to pay, or a number that decides is not finite.
        """
        rows = x.flatten(0, 1)
        rotated = self.rotation.rotate(rows)
        bound = self.bound(rotated)
        if not bound.isfinite().all():  # where x is not, none is, and the rounded product refuses such rows
            return None
        screen = self.rounded(rotated)
        if ban is not None:
            ban(screen.view(*x.shape[:-1], -1))
        lowest = (screen - bound).amax(1, keepdim=True)
        ids = (screen + bound >= lowest).any(0).nonzero()[:, 0]
        if not 0 < len(ids) <= MOST_LEFT * len(self.weight):  # none: rounded products that are not finite
            return None
        copies = (self.weight.index_select(0, some).to(rows.dtype) for some in ids.split(COPIED_AT_ONCE))
        logits = torch.cat([rows @ copy.T for copy in copies], 1)
        if ban is not None:
            logits.masked_fill_(screen.index_select(1, ids) == -torch.inf, -torch.inf)
        highest, places = logits.max(1)
        return ids[places].view(x.shape[:-1]) if highest.isfinite().all() else None

    def bound(self, x: Tensor) -> Tensor:
        """Return how far each token's rounded logits of rotated x [N, D] may be off, in any row: [V]."""
        # FBGEMM rounds to a grid of 255 steps over the range of all rows, in which 0 is and has a place.
        low, high = torch.aminmax(x)
        step = (high.clamp(min=0) - low.clamp(max=0)) / 255
        rounding = (x - (x / step).round() * step).norm(dim=1).max()
        return torch.addcmul(self.size * rounding, self.error, x.norm(dim=1).max())

    @property
    def nbytes(self) -> int:
        """Count the bytes of its own."""
        return self.rounded.nbytes + self.error.nbytes + self.size.nbytes


def bounds_of(rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Return |w - w'| [v] and |w'| [v] of rows of the head [v, D], no smaller than they are."""
    levels, scale = round_to_int8(rotated, ScreenInt8.levels)
    rounded = levels * scale[:, None]
    return SLACK * (rotated - rounded).norm(dim=1), SLACK * rounded.norm(dim=1)


def screened_head(decoder: Decoder) -> ScreenedHead | None:
    """Return a ScreenedHead of the model; None where it would not pay, or does not work on this machine.

    The embedding must be the head, which is kept for it anyway: then it takes a quarter of the head's bytes more.
    """
    weight = decoder.head_weight.detach()
    tied = decoder.head_weight is decoder.embedding.weight and decoder.head_bias is None
    if not tied or weight.numel() < FEWEST_NUMBERS or decoder.logit_softcap is not None:  # capped, close ones are equal
        return None
    return ScreenedHead(weight) if keeps_bounds(weight[:ROWS_AT_ONCE]) else None


def keeps_bounds(sample: Tensor) -> bool:
    """Say whether this machine's rounded products of `sample` [V, D] are where they should be."""
    if obstacle_to(ScreenInt8, sample) is not None:
        return False
    head, rows = ScreenedHead(sample), sample[:8].float()
    off = (head(rows) - rows @ sample.float().T).abs()
    return bool((off <= head.bound(head.rotation.rotate(rows))).all())
