"""Which form holds a model's weights: tried at load, on some of its matrices, on this machine."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lskip.inference.layers.bagged import Bagged
from lskip.inference.layers.convolved import Convolved
from lskip.inference.layers.linear import (
    EXACT_WIDTH,
    Form,
    Halved,
    Mixed,
    Packed,
    PackedWide,
    Plain,
    Sliced,
    Split,
    Transposed,
    Widened,
    hold,
    scripted,
)

Mix = tuple[tuple[int, int], ...]  # (how often, rows): the products that a form is chosen for
# For one text at a time:
STEPS_AND_VERIFICATION: Mix = ((12, 1), (1, 5))  # nothing drafts, or the first layers do: mostly a row at a time
VERIFICATION_OF_FEW: Mix = ((1, 1), (4, 3))  # where an exit adapter drafts, and now and then nothing
VERIFICATION: Mix = ((1, 1), (4, 8))  # where other weights draft
PAYING_ROWS = 16  # beyond about so many a pass costs by the row, and no draft pays
BATCH_ROWS = 4  # where each product has so many, Convolved is tried: a single text's load is not to wait for it
MOST_ROWS = 64  # so that a large model is tried within seconds
FORMS = {"plain": Plain, "transposed": Transposed, "packed": Packed, "halved": Halved}


def mix_for(batch_size: int, rounded: bool = False, adapter: bool = False) -> Mix:
    """The products of texts that are decoded together.

    Args:
        rounded: another copy of the weights drafts.
        adapter: an exit adapter drafts.
    """
    alone = VERIFICATION_OF_FEW if adapter else VERIFICATION if rounded else STEPS_AND_VERIFICATION
    paying = max(batch_size, PAYING_ROWS)
    return tuple((times, min(rows * batch_size, paying, MOST_ROWS)) for times, rows in alone)


def choose_form(form: str, samples: list[Tensor], mix: Mix = STEPS_AND_VERIFICATION) -> Form:
    """The class that holds the weights of a model on this machine.

    Args:
        form: a name in FORMS; or "auto": whatever is fastest here and computes the right thing.
        samples: [out, in] each, some of the model's matrices, to try the forms on.
        mix: the products that "auto" should be fastest at.

    Raises:
        ValueError: unknown form, or one that does not work here.
    """
    if form not in ("auto", *FORMS):
        raise ValueError(f"weights: {form!r} is not one of auto, {', '.join(FORMS)}")
    if form != "auto":
        if (reason := obstacle_to(FORMS[form], samples[0])) is not None:
            raise ValueError(f"weights: {form!r} does not work here ({reason}); use 'auto' or 'plain'")
        return FORMS[form]
    if samples[0].dtype in (torch.bfloat16, torch.float16):
        # Forms round to different texts here, so that no timing may choose; in float32 texts are equal.
        return next(form for form in (Packed, Halved, Widened, Plain) if obstacle_to(form, samples[0]) is None)
    forms = (Transposed, Split, Bagged, Packed, PackedWide, Halved)
    if min(rows for _, rows in mix) >= BATCH_ROWS:
        forms = (*forms, Convolved)
    usable = [form for form in forms if obstacle_to(form, samples[0]) is None]
    return fastest_by_shape([Plain, *usable], samples, mix, otherwise=Packed)


# Where bits are kept unless the caller says otherwise: texts of bfloat16 models part within some tens of tokens.
EXACT_BY_DEFAULT = {("cpu", torch.bfloat16, Packed)}


def exact_by_default(form: Form, sample: Tensor) -> bool:
    """Whether bits are to be kept where nobody has said: a table, never a timing, so that texts do not depend on it."""
    return (sample.device.type, sample.dtype, form) in EXACT_BY_DEFAULT


def choose_exact_form(form: str, samples: list[Tensor]) -> Form:
    """The class that holds the weights so that a row's bits do not depend on the rows beside it.

    Raises:
        ValueError: unknown form, or one that does not work here.
    """
    if form == "plain":
        return Sliced
    if form not in ("auto", "packed"):
        raise ValueError(f"weights: {form!r} does not go with bit_exact; use 'auto', 'packed' or 'plain'")
    if form == "packed" and (reason := obstacle_to_bits(Packed, samples[0])) is not None:
        raise ValueError(f"weights: {form!r} does not work here ({reason}); use 'auto' or 'plain'")
    candidates = [Packed, Widened] if form == "auto" and samples[0].dtype == torch.bfloat16 else [Packed]
    return next((each for each in candidates if obstacle_to_bits(each, samples[0]) is None), Sliced)


def obstacle_to_bits(form: Form, sample: Tensor) -> str | None:
    """Why `sample` [out, in] held so would not keep bits; None when it does."""
    reason = obstacle_to(form, sample)
    if reason is None and not keeps_bits(form, sample):
        reason = "its products depend on the number of rows"
    return reason


def keeps_bits(form: Form, sample: Tensor) -> bool:
    """Whether products of 4, 12 and 64 rows agree bit for bit on the rows that they share."""
    held = form(sample)
    dtype = form.inner_dtype or sample.dtype
    rows = torch.linspace(-1, 1, 64 * sample.shape[1], dtype=dtype, device=sample.device).view(64, -1)
    whole = held(rows)
    return all(torch.equal(held(rows[:count]), whole[:count]) for count in (EXACT_WIDTH, 3 * EXACT_WIDTH))


def obstacle_to(form: Form, sample: Tensor) -> str | None:
    """Why `sample` [out, in] cannot be held so on this machine; None when its products come out right."""
    if form is Plain:
        return None
    if sample.device.type != "cpu":
        return f"the model is on {sample.device.type}, this form is for the CPU"
    widens = form.inner_dtype is torch.float32
    if sample.dtype not in (torch.float32, torch.bfloat16) and not (widens and sample.dtype is torch.float16):
        return f"not for {sample.dtype}"
    row = torch.linspace(-1, 1, sample.shape[1], dtype=sample.dtype)[None]
    residual = torch.linspace(-1, 1, sample.shape[0], dtype=sample.dtype)[None]
    # Builds without oneDNN or FBGEMM lack operations (AttributeError, RuntimeError); CPUs without AVX-512 refuse
    # bfloat16 (RuntimeError).
    try:
        held = form(sample)
        x = row.to(form.inner_dtype or row.dtype)
        products = torch.cat([held(x), held.add_to(residual, x)]).float()
    except (AttributeError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    plain = Plain(sample)
    expected = torch.cat([plain(row), plain.add_to(residual, row)]).float()
    tolerance = (1e-3 if sample.dtype == torch.float32 else 5e-2) * max(1.0, float(expected.abs().max()))
    right = float((products - expected).abs().max()) <= tolerance
    return None if right else "its products differ from torch's"


def fastest(forms: list[type[Plain]], samples: list[Tensor], mix: Mix) -> type[Plain]:
    """The form that takes least for `mix`."""
    if len(forms) == 1:
        return forms[0]
    costs = cost_of(forms, samples, mix)
    return min(costs, key=lambda form: sum(costs[form]))


def fastest_by_shape(
    forms: list[type[Plain]], samples: list[Tensor], mix: Mix, otherwise: type[Plain] | None = None
) -> Form:
    """What takes least for `mix`: a form for each shape of matrix, or one for all.

    Args:
        otherwise: for shapes that are not among `samples`, if it is one of `forms`; None: what takes least over all.
    """
    if len(forms) == 1:
        return forms[0]
    costs = cost_of(forms, samples, mix)

    def seconds(form: type[Plain], shape: torch.Size | None = None) -> float:
        each = zip(samples, costs[form], strict=True)
        return sum(cost for sample, cost in each if shape in (None, sample.shape))

    one = min(forms, key=seconds)
    mixable = [form for form in forms if form.lone_row_width == 1]  # how a lone row is seen is the same for all
    chosen = {shape: min(mixable, key=lambda form: seconds(form, shape)) for shape in {s.shape for s in samples}}
    if sum(seconds(form, shape) for shape, form in chosen.items()) > seconds(one):
        return one
    rest = otherwise if otherwise in mixable else min(mixable, key=seconds)
    if set(chosen.values()) == {rest}:
        return rest
    return Mixed({tuple(shape): form for shape, form in chosen.items()}, rest)


@torch.inference_mode()
def cost_of(
    forms: list[type[Plain]], samples: list[Tensor], mix: Mix, rounds: int = 20, limit: float = 4.0
) -> dict[type[Plain], list[float]]:
    """Seconds that each form takes for `mix`, sample by sample.

    Other processes only ever add time: the best of each single product is nearest to the truth. On a busy machine
    threads wait for each other, for milliseconds in a product of microseconds, so that one thread is tried as well
    as all of them. A product that two forms share is timed once: chance must not decide between them. No round
    begins after `limit` seconds.
    """
    kinds = {kind_of(form): form for form in forms}
    held = {(kind, index): hold(form, sample) for kind, form in kinds.items() for index, sample in enumerate(samples)}
    # What is timed, all samples before the first comes again: in decoding no cache has seen a matrix lately.
    best = {
        (kind_of(form), index, seen_as(form, rows)): math.inf
        for form in forms
        for _, rows in mix
        for index in range(len(samples))
    }
    threads, begin = torch.get_num_threads(), time.perf_counter()
    try:
        for _ in range(rounds):  # interleaved, so that a busy spell of the machine meets every form
            for count in {1, threads}:
                torch.set_num_threads(count)
                for kind, index, rows in best:
                    x = samples[index].new_ones(rows, samples[index].shape[1])
                    seconds = seconds_of(held[kind, index], x)
                    best[kind, index, rows] = min(best[kind, index, rows], seconds)
            if time.perf_counter() - begin > limit:
                break
    finally:
        torch.set_num_threads(threads)
    return {
        form: [
            sum(weight * best[kind_of(form), index, seen_as(form, rows)] for weight, rows in mix)
            for index in range(len(samples))
        ]
        for form in forms
    }


def kind_of(form: type[Plain]) -> tuple:
    """What is held, and what multiplies it: forms in which both are the same differ in the rows that they are sent."""
    return form.__init__, form.product


def seen_as(form: Form, rows: int) -> int:
    """Rows that a form's product is given for so many."""
    return form.lone_row_width if rows == 1 else rows


def seconds_of(matrix: Plain, x: Tensor) -> float:
    """The time that one product takes, run as blocks run it."""
    product = scripted(matrix.product)
    begin = time.perf_counter()
    product(x, matrix.held)
    return time.perf_counter() - begin
