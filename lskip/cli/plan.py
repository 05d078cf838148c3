"""`lskip plan`: memory, FLOPs and hours of a fit with the same options, without its weights and its data."""

import re
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from transformers import PreTrainedConfig

from lskip.cli.config_files import bound_yaml
from lskip.cli.errors import innermost
from lskip.cli.fit import CHOICES, METHODS, LayerSkipCLI
from lskip.cli.named_classes import restrict_imports
from lskip.cli.option_parsing import parse_options
from lskip.cli.runs.fit_help import explain_options
from lskip.cli.runs.option_checks import check_options
from lskip.data import TextData
from lskip.flops import known_peak
from lskip.models.pretrained import load_config, make_config
from lskip.planning.memory import DDP, FSDP2, SINGLE
from lskip.planning.plan import RunShape, plan_run
from lskip.planning.report import print_plan, record_of
from lskip.planning.simulation import PRECISIONS, Batch
from lskip.training.fsdp2 import FSDP2 as FSDP2Strategy
from lskip.training.lightning_utils import quiet_lightning
from lskip.utils.checks import check_real, check_whole
from lskip.utils.console import plain_console
from lskip.utils.output_files import check_output_file, write_json
from lskip.utils.user_paths import user_path

LONG_NAMES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
ACCELERATORS = ("auto", "gpu", "cuda", "cpu")
MOST_DEVICES = 2**20


def run_plan(arguments: list[str]) -> None:
    """Run `plan`, the first argument, with the others as its options."""
    quiet_lightning()
    bound_yaml()
    restrict_imports()
    PlanCLI(arguments)


class _Planned(Trainer):
    """The Trainer whose options are parsed; nothing is made of it."""

    plan = Trainer.fit


class PlanCLI(LayerSkipCLI):
    """The command line of `lskip plan`: that of `lskip fit`, and how fast the devices are.

    Raises:
        ValueError, OSError: mistakes of the user.
    """

    @property
    def trainer_class(self) -> type[Trainer]:
        return _Planned

    @trainer_class.setter
    def trainer_class(self, _: type[Trainer]) -> None:
        """Keep the class above, which LightningCLI would set to its default."""

    def subcommands(self) -> dict[str, set[str]]:
        return {"plan": LightningCLI.subcommands()["fit"]}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **settings) -> LightningArgumentParser:
        settings["description"] = "Prints memory, FLOPs and hours of a fit with the same options, without running it."
        parser = LightningCLI._prepare_subcommand_parser(self, klass, subcommand, **settings)
        explain_options(parser, "fit")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        help_of_mfu = "share of the devices' peak (peak_flops) that training is taken to reach, for the hours"
        parser.add_argument("--mfu", type=float, default=0.4, help=help_of_mfu)
        parser.add_argument("--output", type=str | None, default=None, help="JSON file to write; null: none")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        self.config = parse_options(parser, args, self._subcommand_parsers["plan"], CHOICES)

    def before_instantiate_classes(self) -> None:
        config = self._settings
        check_real("mfu", config.mfu, "above 0 and at most 1", lambda value: 0 < value <= 1)
        if config.peak_flops is not None:
            check_real("peak_flops", config.peak_flops, "above 0", lambda value: value > 0)
        if config.output is not None:
            check_output_file(user_path(config.output, "output"))
        check_options(config)
        self._model_config = config_of(config.model)
        if config.data is not None and config.data.class_path.endswith(f".{TextData.__name__}"):
            # Of the data the sizes are read alone: source, tokenizer and cache need not be here.
            for name, value in (("source", "stdlib"), ("tokenizer", None), ("cache_dir", None), ("seed", 0)):
                config.data.init_args[name] = value

    def instantiate_classes(self) -> None:
        try:
            built = self.parser.instantiate_classes(self.config)["plan"]
        except ValueError as error:
            raise ValueError(innermost(str(error))) from error
        arguments = {name: built[name] for name in self._module_arguments if name != "model"}
        callbacks = [built[key] for key in METHODS if built[key] is not None]
        callbacks += [each for each in _listed(built.trainer.callbacks) if writes_vectors(each)]
        self.shape = shape_of(built)
        self.plan = plan_run(self._model_config, arguments, callbacks, self.shape)

    def _run_subcommand(self, subcommand: str) -> None:
        config = self._settings
        peak = None if config.peak_flops is None else config.peak_flops * 1e12
        if peak is None and self.shape.on_gpu and torch.cuda.is_available():
            peak = known_peak(torch.cuda.get_device_name(), self.shape.precision)
        print_plan(self.plan, config.mfu, peak, plain_console())
        if config.output is not None:
            write_json(user_path(config.output, "output"), record_of(self.plan, config.mfu, peak))


def config_of(model: dict[str, Any] | str) -> PreTrainedConfig:
    """Return the config of what `--model` names, however large; its weights are not read."""
    return make_config(model, fits_here=False) if isinstance(model, dict) else load_config(model)


def writes_vectors(callback: Any) -> bool:
    """Return whether a callback is one of lskip's that set drop rates or exit weights at a step."""
    kind = type(callback)
    return kind.__module__.startswith("lskip.callbacks.") and "on_train_batch_start" in vars(kind)


def shape_of(built: Namespace) -> RunShape:
    """Return the sizes of a run by its options.

    Raises:
        ValueError: one sentence on an option that cannot be planned with.
    """
    rows, length = (getattr(built.data, name, None) for name in ("batch_size", "block_size"))
    if rows is None or length is None:
        raise ValueError(f"data: a {type(built.data).__name__} has no batch_size and block_size, which a plan goes by")
    check_whole("batch_size", rows, 1)
    check_whole("block_size", length, 2)
    trainer = built.trainer
    precision = str(trainer.precision or "32-true")
    precision = LONG_NAMES.get(precision, precision)
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision: {precision!r} cannot be planned; allowed: {', '.join(PRECISIONS)}")
    accelerator = trainer.accelerator if isinstance(trainer.accelerator, str) else type(trainer.accelerator).__name__
    if accelerator not in ACCELERATORS:
        raise ValueError(f"trainer.accelerator: {accelerator!r} cannot be planned; allowed: {', '.join(ACCELERATORS)}")
    on_gpu = accelerator != "cpu"
    devices = number_of_devices(trainer.devices, on_gpu) * trainer.num_nodes
    if devices > MOST_DEVICES:
        raise ValueError(f"trainer.devices: {devices} on all nodes; a plan is for at most {MOST_DEVICES}")
    steps = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else None
    has_documents = getattr(built.data, "are_apart", False) or getattr(built.data, "pack", False)
    has_mask = has_documents and not (on_gpu and built.flex_attention)
    batch = Batch(rows, length, trainer.accumulate_grad_batches, has_mask)
    return RunShape(batch, devices, strategy_of(trainer.strategy, devices), precision, on_gpu, steps)


def number_of_devices(devices: Any, on_gpu: bool) -> int:
    """Return how many devices a machine has by `trainer.devices`; `auto` and -1 are those of this one, at least 1."""
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return max(torch.cuda.device_count(), 1) if on_gpu else 1
    return len(re.findall(r"\d+", text)) if "," in text else int(text)


def strategy_of(strategy: Any, devices: int) -> str:
    """Return SINGLE, DDP or FSDP2 by `trainer.strategy`; ValueError for another."""
    name = strategy if isinstance(strategy, str) else ""
    if isinstance(strategy, FSDP2Strategy) or name == "fsdp2":
        return FSDP2
    if isinstance(strategy, DDPStrategy) or name.startswith("ddp"):
        return DDP
    if isinstance(strategy, SingleDeviceStrategy) or name == "auto":
        return DDP if devices > 1 else SINGLE
    said = repr(name) if name else type(strategy).__name__
    raise ValueError(f"trainer.strategy: {said} cannot be planned; allowed: auto, ddp, fsdp2")


def _listed(callbacks: Any) -> list:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
