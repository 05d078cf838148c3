"""Peak memory of one setting, measured in a separate process.

    python -m benchmarks.decoding.memory JOB      JOB as `peak_of` makes it

Memory of loading and converting is left out: the peak is that of decoding with the weights in place.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path


def peak_resident_mib() -> float:
    """The most memory that this process has had since its start, or since `forget_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Reset the peak to the present memory, after returning free memory to the system."""
    # Only here: llama.cpp's interpreter, which measures itself with this file, has no lskip.
    from lskip.utils.devices import trim_heap

    gc.collect()
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(setting, group: list[list[int]], options) -> float:
    """MiB that `setting` takes for a group of prompts (on a GPU: of its memory), `options` being the command line's."""
    wanted = ("model", "device", "threads", "assistant", "max_new_tokens")
    job = {"setting": asdict(setting), "group": group, **{name: getattr(options, name) for name in wanted}}
    job["exit_adapter"] = options.exit_adapter if setting.draft == "adapter" else None
    command = [sys.executable, "-m", "benchmarks.decoding.memory", json.dumps(job)]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet).stdout.split()[-1])


def peak_here(job: dict) -> float:
    """Run the job in this process."""
    # Only here, too: llama.cpp's interpreter has none of them.
    import torch

    from benchmarks.decoding.contestant_builder import Contestants, load
    from benchmarks.decoding.settings import Setting
    from lskip.models.exit_adapter import find_adapter, load_adapter

    torch.set_num_threads(job["threads"])
    setting = Setting(**job["setting"])
    model, _ = load(job["model"], setting.precision, job["device"])
    needs_assistant = job["assistant"] is not None and setting.method == "hf_assistant"
    assistant = load(job["assistant"], setting.precision, job["device"])[0] if needs_assistant else None
    adapter = load_adapter(find_adapter(job["exit_adapter"]), model) if job["exit_adapter"] else None
    contestants = Contestants(job["model"], model, assistant, release=True, exit_adapter=adapter)
    contestant = contestants.build(setting)
    if not setting.method.startswith("hf_"):
        del model, adapter, contestants  # lskip has taken the model apart, and holds the adapter's weights its own way
    forget_peak()
    contestant.run(job["group"], job["max_new_tokens"])
    if job["device"].startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mib()


if __name__ == "__main__":
    print(peak_here(json.loads(sys.argv[1])))
