"""The JSON file that keeps the costs of a model's passes on a machine, and what a policy learnt there."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lskip.inference.drafting.costs import FAR, Costs, blocks_of, fields_of, measure_costs, measured_while_busy
from lskip.inference.drafting.learnt import check_learnt
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.runners.base import ModelRunner
from lskip.inference.runners.draft_head import DraftHead
from lskip.utils.console import warn
from lskip.utils.output_files import make_writable, write_json
from lskip.utils.untrusted import parse_json, read_text
from lskip.utils.user_errors import one_line
from lskip.utils.user_paths import user_path

CACHE = "~/.cache/lskip/costs"
SAMPLED = 64  # numbers of each matrix that tell models apart
KEPT_EVERY = 10.0  # seconds between two writings of what one policy learnt: a short text may take as long as a writing
_kept_at: WeakKeyDictionary[DraftPolicy, float] = WeakKeyDictionary()


def cached_costs_file(loaded: list, device: torch.device) -> str | None:
    """Return the file of the costs of a model as it was loaded, on this machine with these threads and this torch.

    None where the cache cannot be written. A file there that lskip cannot read is removed.

    Args:
        loaded: what identifies the model, and everything that was loaded with it and that costs depend on.
    """
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    here = [FAR, platform.node(), os.cpu_count(), torch.get_num_threads(), torch.__version__, device.type, name]
    key = hashlib.sha256(json.dumps([loaded, here], sort_keys=True, default=str).encode()).hexdigest()[:24]
    try:
        path = user_path(CACHE, "costs_file") / f"{key}.json"
        make_writable(path.parent, "costs_file")
    except ValueError:  # a home that cannot be written: nothing that the user asked for
        return None
    try:
        check_costs_file(path)
    except (ValueError, OSError):
        if path.is_dir():
            return None
        path.unlink(missing_ok=True)
    return str(path)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of the names and shapes of a model's weights, and of some numbers of each."""
    digest = hashlib.sha256()
    for name, part in weights.items():
        some = part.detach().flatten()[:: max(1, part.numel() // SAMPLED)][:SAMPLED].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(part.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def keep_costs(
    path: Path,
    runner: ModelRunner,
    draft_runner: ModelRunner | None = None,
    adapter_runner: ModelRunner | None = None,
    draft_head: DraftHead | None = None,
) -> Costs:
    """Return the costs in a JSON file of this model on this machine; measure and write them where there is none.

    Those that were measured while the machine was busy are measured again.

    Raises:
        ValueError: a file that holds something else, or costs of another model or device.
    """
    here, layouts = runner.device.type, [getattr(each, "layout", None) for each in (runner, draft_runner)]
    saved = _read(path) if path.exists() else None
    if saved is not None:
        _check_loaded(path, saved, here, layouts, (runner, draft_runner, adapter_runner, draft_head))
        if not measured_while_busy(saved["costs"], runner, draft_runner):
            return saved["costs"]
    costs = measure_costs(runner, draft_runner, adapter_runner=adapter_runner, draft_head=draft_head)
    known = {} if saved is None or saved["learnt"] is None else {"learnt": saved["learnt"]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"device": here, "layouts": layouts, "costs": costs.to_dict(), **known})
    except OSError as error:  # a full disk: the text that asked for them goes on
        warn(f"costs_file: is not kept ({one_line(error)})")
    return costs


def _check_loaded(path: Path, saved: dict[str, Any], here: str, layouts: list, loaded: tuple) -> None:
    """Raise ValueError where saved costs are of another device, or of something else than what is loaded."""
    runner, draft_runner, adapter_runner, draft_head = loaded
    device, costs = saved["device"], saved["costs"]
    if device != here:
        raise ValueError(f"costs_file: '{path}' was measured on {device!r}, not on {here!r}; name another")
    measured = costs.num_layers, costs.draft is None, costs.adapter_blocks, costs.model.draft_head is None
    there = runner.num_layers, draft_runner is None, blocks_of(adapter_runner), draft_head is None
    if measured != there or saved["layouts"] not in (None, layouts):
        parts = "another model, of other draft_weights, of other draft_tokens or of another exit_adapter"
        raise ValueError(f"costs_file: '{path}' is of {parts}; name another file")


def read_costs(path: Path) -> tuple[str, Costs]:
    """Return the device and the costs of a costs_file; ValueError if it has something else."""
    saved = _read(path)
    return saved["device"], saved["costs"]


def _read(path: Path) -> dict[str, Any]:
    """Return the device, the layouts, the costs and what was learnt; ValueError for a file of something else."""
    advice = "remove it to measure again"
    try:
        fields = _saved(path)
        fields["costs"] = Costs.from_dict(fields["costs"])
        if fields["learnt"] is not None:
            check_learnt(fields["learnt"])
    except (ValueError, OSError) as error:  # OSError: a folder
        said = one_line(error).removeprefix("costs_file: ")
        said = said if str(path) in said else f"'{path}': {said}"
        raise ValueError(f"costs_file: {said}; {advice}") from error
    if not isinstance(fields["device"], str):
        raise ValueError(f"costs_file: '{path}': device: {fields['device']!r} is not a text; {advice}")
    return fields


def _saved(path: Path) -> dict[str, Any]:
    saved = parse_json(read_text(path, "costs_file"), f"costs_file: '{path}'")
    if isinstance(saved, dict):  # a new file has nothing learnt; those of before have no layouts either
        saved = {"learnt": None, "layouts": None} | saved
    return fields_of(saved, f"costs_file: '{path}'", ("device", "layouts", "costs", "learnt"))


class Learner:
    """A policy whose learning goes on from process to process, in the costs_file; without one it does nothing."""

    def __init__(self, costs_file: str | None, policy: DraftPolicy | None):
        self.path = None if costs_file is None or policy is None else user_path(costs_file, "costs_file")
        self.policy = policy

    def recall(self) -> None:
        """Let the policy begin with what one learnt in an earlier process; ValueError for a file of something else."""
        if self.path is None or self.policy.learnt() or not self.path.exists():
            return
        learnt = _read(self.path)["learnt"]
        if learnt is not None:
            self.policy.recall(learnt)

    def keep(self) -> None:
        """Write what the policy learnt, in one step, unless it was just written; a full disk brings a warning."""
        if self.path is None or time.monotonic() - _kept_at.get(self.policy, -math.inf) < KEPT_EVERY:
            return
        if not (learnt := self.policy.learnt()):
            return
        _kept_at[self.policy] = time.monotonic()
        try:
            write_json(self.path, _saved(self.path) | {"learnt": learnt})
        except (OSError, ValueError) as error:  # or the file has gone meanwhile: the texts are what was asked for
            warn(f"costs_file: what the policy learnt is not kept ({one_line(error)})")


def check_costs_file(path: Path) -> None:
    """Raise ValueError or OSError, before a model is loaded, if the file can be neither read nor made."""
    if path.is_dir():
        raise IsADirectoryError(f"costs_file: '{path}' is a folder, not a JSON file")
    if path.exists():
        read_costs(path)
    else:
        make_writable(path.parent, "costs_file")
