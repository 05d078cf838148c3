"""The rule by which a model's weights get their layout on this machine.

Nothing is timed: layouts round differently, and a text must not depend on how busy a machine was when it loaded.
A layout is left out only where its operations are missing or compute something else (`obstacle_to`).
"""

import torch
from torch import Tensor

from lskip.inference.layers.bags import Bagged, BaggedInt8, bags_pay
from lskip.inference.layers.linear import EXACT_WIDTH, Halved, Layout, Packed, Plain, Sliced, Widened

LAYOUTS = {"plain": Plain, "packed": Packed, "halved": Halved, "int8": BaggedInt8}


def choose_layouts(weights: str, sample: Tensor, lone_rows: bool = True) -> list[Layout]:
    """Return the layouts for a model's weights; each matrix takes the first that can hold it (`pack`).

    Args:
        weights: a name in LAYOUTS; or "auto": by the model's type, and by what its products will see, and never one
            that rounds.
        sample: [out, in], one of the model's matrices.
        lone_rows: most passes have a single row: one text at a time, and nothing drafts that has weights of its own.

    Raises:
        ValueError: unknown layout, or one that does not work here.
    """
    if weights not in ("auto", *LAYOUTS):
        raise ValueError(f"weights: {weights!r} is not one of auto, {', '.join(LAYOUTS)}")
    if weights != "auto":
        layout = LAYOUTS[weights]
        if (reason := obstacle_to(layout, sample)) is not None:
            raise ValueError(f"weights: {weights!r} does not work here ({reason}); use 'auto' or 'plain'")
        return [layout, Widened] if layout is Halved and obstacle_to(Widened, sample) is None else [layout]
    if sample.dtype == torch.float32:
        wanted = [Halved, *([Bagged] if lone_rows and bags_pay() else []), Packed]
    elif obstacle_to(Packed, sample) is None:
        wanted = [Packed]
    else:
        wanted = [Halved, Widened]
    return [layout for layout in wanted if obstacle_to(layout, stand_in(sample)) is None] or [Plain]


def stand_in(sample: Tensor) -> Tensor:
    """Return a small matrix [out, in] like `sample` that every layout can hold, where its operations work."""
    return torch.linspace(-1, 1, 256, device=sample.device).bfloat16().to(sample.dtype).view(16, 16)


def exact_by_default(layouts: list[Layout], sample: Tensor) -> bool:
    """Say whether bits are kept where nobody has said: bfloat16 texts would part within some tens of tokens."""
    return layouts == [Packed] and sample.dtype == torch.bfloat16


def choose_exact_layout(weights: str, sample: Tensor) -> Layout:
    """Return the layout in which a row's bits do not depend on the rows beside it.

    Raises:
        ValueError: unknown layout, or one that does not work here.
    """
    if weights == "plain":
        return Sliced
    if weights not in ("auto", "packed"):
        raise ValueError(f"weights: {weights!r} does not go with bit_exact; use 'auto', 'packed' or 'plain'")
    if weights == "packed" and (reason := obstacle_to_bits(Packed, sample)) is not None:
        raise ValueError(f"weights: {weights!r} does not work here ({reason}); use 'auto' or 'plain'")
    candidates = [Packed, Widened] if weights == "auto" and sample.dtype == torch.bfloat16 else [Packed]
    return next((each for each in candidates if obstacle_to_bits(each, sample) is None), Sliced)


def obstacle_to_bits(layout: Layout, sample: Tensor) -> str | None:
    """Say why `sample` [out, in] in this layout would not keep bits; None when it does."""
    reason = obstacle_to(layout, sample)
    if reason is None and not keeps_bits(layout, sample):
        reason = "its products depend on the number of rows"
    return reason


def keeps_bits(layout: Layout, sample: Tensor) -> bool:
    """Say whether products of 4, 12 and 64 rows agree bit for bit on the rows that they share."""
    matrix = layout(sample)
    dtype = layout.inner_dtype or sample.dtype
    rows = torch.linspace(-1, 1, 64 * sample.shape[1], dtype=dtype, device=sample.device).view(64, -1)
    whole = matrix(rows)
    return all(torch.equal(matrix(rows[:count]), whole[:count]) for count in (EXACT_WIDTH, 3 * EXACT_WIDTH))


def obstacle_to(layout: Layout, *samples: Tensor) -> str | None:
    """Say why a sample [out, in] cannot have this layout on this machine; None when products come out right."""
    return next(filter(None, (_obstacle_to_one(layout, sample) for sample in samples)), None)


def _obstacle_to_one(layout: Layout, sample: Tensor) -> str | None:
    if layout is Plain:
        return None
    if sample.device.type != "cpu":
        return f"the model is on {sample.device.type}, this layout is for the CPU"
    if sample.dtype not in (torch.float32, torch.bfloat16) and layout.inner_dtype is None:
        return f"not for {sample.dtype}"
    row = torch.linspace(-1, 1, sample.shape[1], dtype=sample.dtype)[None]
    # Builds without oneDNN or FBGEMM lack operations (AttributeError, RuntimeError); CPUs without AVX-512 refuse
    # bfloat16 (RuntimeError).
    try:
        matrix, x = layout(sample), row.to(layout.inner_dtype or row.dtype)
        products = matrix(x).double(), matrix.add_to(x.new_ones(1, len(sample)), x).double() - 1
    except (AttributeError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    exact = row.double() @ sample.double().T
    most = (layout.error or (1e-3 if sample.dtype == torch.float32 else 5e-2)) * exact.norm().clamp(min=1)
    return None if max(float((product - exact).norm()) for product in products) <= most else "its products differ"
