"""Processes of one training, over gloo on the CPU, as torchrun starts them."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import warnings
from collections.abc import Callable

import torch
from torch import multiprocessing

from benchmarks.decoding.options import numbers
from lskip.training.lightning_utils import quiet_lightning

# Settings of a Trainer on the CPU that shows and writes nothing.
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

# What a process imports longest: a server imports it once, and the processes are its forks.
IMPORTED_ONCE = ["lightning.pytorch", "transformers", "lskip.module", "lskip.data"]


def add_ways(parser: argparse.ArgumentParser) -> None:
    """Add the options that say by how many processes, and how, something is trained."""
    parser.add_argument("--world_sizes", type=numbers, default=(2, 4), help="such as 2,4")
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=("ddp",), help="such as ddp")


def run_ranks(world_size: int, work: Callable[..., None], *arguments) -> None:
    """Call `work(*arguments)` in so many new processes, each of which finds its rank as under torchrun.

    Raises:
        ProcessRaisedException: of the first that failed; the others have been ended.
    """
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    entry = world_size, _free_port(), work, arguments
    multiprocessing.start_processes(_enter, entry, nprocs=world_size, start_method="forkserver")


def _enter(rank: int, world_size: int, port: int, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    quiet_lightning()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")  # of few steps without validation
    if world_size > 1:
        os.environ |= {
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)},
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)},
            **{"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "lskip"},
        }
    work(*arguments)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
