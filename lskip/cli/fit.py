"""`lskip fit`, `validate` and `test`: a LightningCLI with the arguments of LayerSkipModule at the top level."""

import copy
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lskip.callbacks import EarlyExitLoss, LayerDropout, LayerMetrics
from lskip.callbacks.run_checkpoint import RunCheckpoint
from lskip.callbacks.run_hparams import RunHparams
from lskip.cli.config_files import CONFIG_HELP, ConfigFile, bound_yaml
from lskip.cli.errors import innermost
from lskip.cli.named_classes import restrict_imports
from lskip.cli.option_parsing import parse_options
from lskip.cli.runs import data_checks
from lskip.cli.runs.device_checks import settle_devices
from lskip.cli.runs.fit_help import explain_options
from lskip.cli.runs.fit_report import print_end
from lskip.cli.runs.option_checks import check_options
from lskip.cli.runs.resuming import (
    changed_settings,
    check_resumable,
    resume_message,
    settings_before,
    settings_of,
)
from lskip.cli.runs.run_data import with_run_data
from lskip.cli.runs.run_folder import RunConfig, check_room, refuse_existing_run, run_place
from lskip.cli.runs.run_logger import RunLogger
from lskip.cli.runs.trainer_checks import (
    check_callbacks,
    check_monitors,
    missing_monitor_named,
    settings_named,
)
from lskip.cli.runs.training_rows import KeepTrainingRows
from lskip.curricula import ExitCurriculum
from lskip.data import TextData
from lskip.evaluation.runs.settings import run_settings
from lskip.evaluation.runs.summary import steps_of
from lskip.low_rank import LowRank
from lskip.models.pretrained import LAST_CHECKPOINT, read_checkpoint
from lskip.models.reading.sources import run_of
from lskip.module import LayerSkipModule
from lskip.schedules import Schedule
from lskip.targets import ExitTarget
from lskip.training.launcher import watched
from lskip.training.lightning_utils import how_to_go_on, interruptible, quiet_lightning
from lskip.training.step_bar import StepBar, wants_bar
from lskip.utils.checks import check_whole
from lskip.utils.console import say
from lskip.utils.interrupts import ended_by_signals
from lskip.utils.user_paths import user_path

METHODS = {"layer_dropout": LayerDropout, "early_exit_loss": EarlyExitLoss}
# The classes that an error message lists after a misspelled one. Short names work for all that is imported here.
CHOICES = {
    **METHODS,
    "curriculum": ExitCurriculum,
    "depth": Schedule,
    "time": Schedule,
    "exit_target": ExitTarget,
    "data": LightningDataModule,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
    "callbacks": Callback,
    "logger": Logger,
    "strategy": Strategy,
    "accelerator": Accelerator,
    "profiler": Profiler,
    "low_rank": LowRank,
}


def run_training(arguments: list[str]) -> None:
    """Run `fit`, `validate` or `test`, named by the first argument, with the others as its options."""
    quiet_lightning()
    bound_yaml()
    restrict_imports()
    with ended_by_signals(" by {signal} before it began; nothing is lost"):
        LayerSkipCLI(arguments)


class LayerSkipCLI(LightningCLI):
    """The command line of training: parses, makes the cheap checks, builds, and calls the Trainer.

    The top level holds `model`, the other arguments of LayerSkipModule, `data` (TextData unless a class_path
    says otherwise), `layer_dropout`, `early_exit_loss` (off unless named), `checkpoint`, `run_folder`, `trainer`.

    Raises:
        ValueError, OSError, MisconfigurationException: mistakes of the user.
    """

    def __init__(self, args: list[str]):
        self._command = args[0]
        parser_kwargs = {"exit_on_error": False, "allow_abbrev": False}
        with ExitStack() as self._locks:
            super().__init__(
                seed_everything_default=0,
                parser_kwargs={**parser_kwargs, self._command: dict(parser_kwargs)},
                save_config_callback=RunConfig,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=args,
            )

    # Options.

    def init_parser(self, **settings) -> LightningArgumentParser:
        parser = self.parser_class(dump_header=[f"lightning.pytorch=={lightning.pytorch.__version__}"], **settings)
        parser.add_argument("-c", "--config", action=ConfigFile, help=CONFIG_HELP)
        return parser

    def subcommands(self) -> dict[str, set[str]]:
        return {self._command: LightningCLI.subcommands()[self._command]}  # building a parser for each takes seconds

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--model",
            type=dict[str, Any] | str,
            required=True,
            help="smollm2, a run folder, a checkpoint, a folder, a hub name, a .gguf file, "
            "or a transformers config (model_type and its fields) to start from scratch",
        )
        self._module_arguments = parser.add_class_arguments(
            LayerSkipModule, skip={"model", "tokenizer", "seed"}, fail_untyped=False
        )
        parser.set_defaults({"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}}})
        parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=False)
        parser.set_defaults({"data": {"class_path": f"lskip.data.{TextData.__name__}"}})
        for key, method in METHODS.items():
            parser.add_subclass_arguments(method, key, fail_untyped=False, required=False)
        parser.add_class_arguments(RunCheckpoint, "checkpoint", skip={"folder"}, instantiate=False)
        parser.add_argument(
            "--run_folder", type=str, default="runs/fit", help="where checkpoints, TensorBoard files and config go"
        )
        parser.add_class_arguments(self.trainer_class, "trainer", fail_untyped=False, instantiate=False)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **settings) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **settings)
        if subcommand != "fit":
            parser.set_defaults(verbose=False)  # the table of layers is printed instead
        explain_options(parser, subcommand)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        args = args if args[0] == "fit" else with_run_data(args)
        self.config = parse_options(parser, args, self._subcommand_parsers[args[0]], CHOICES)
        seed = self.config[args[0]].seed_everything
        if not isinstance(seed, bool):
            check_whole("seed_everything", seed, 0, 2**32 - 1)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the hyperparameters of a checkpoint never override the command line."""

    # Cheap checks, before the model is loaded.

    def before_instantiate_classes(self) -> None:
        config = self._settings
        self.folder = user_path(config.run_folder, "run_folder")
        check_options(config)
        settle_devices(config.trainer, self.subcommand == "fit" and config.checkpoint.sharded)
        self._resolve_checkpoint(config)
        if self.subcommand == "fit":
            self._check_run()
        if not config.trainer.fast_dev_run:  # which writes nothing
            self._lock_folder()

    @property
    def _settings(self) -> Namespace:
        return self.config[self.subcommand]

    def _resolve_checkpoint(self, config: Namespace) -> None:
        self.ckpt_path, self.resumed = None, None
        if config.ckpt_path is None:
            return
        path = self.folder / LAST_CHECKPOINT if config.ckpt_path == "last" else user_path(config.ckpt_path, "ckpt_path")
        if not path.is_file():
            raise FileNotFoundError(f"ckpt_path: {config.ckpt_path!r}: there is no file '{path}'")
        self.ckpt_path, self.resumed = str(path), read_checkpoint(path, "ckpt_path", whole=True)
        config.ckpt_path = None  # so that config.yaml of a resumed run is that of the run

    def _check_run(self) -> None:
        """Check that a new run has a folder without one, or what a resumed run changes."""
        if self.resumed is None:
            data_checks.settle_data(self._settings, {})
            if not self._settings.trainer.fast_dev_run:
                refuse_existing_run(self.folder)
            return
        if "optimizer_states" not in self.resumed:
            raise ValueError(f"ckpt_path: {self.ckpt_path!r} holds weights alone; begin with them by --model")
        before = settings_before(self.resumed, Path(self.ckpt_path))
        data_checks.settle_data(self._settings, before)
        self.changes = changed_settings(before, settings_of(self._settings.as_dict()), self.resumed)

    def _lock_folder(self) -> None:
        fit = self.subcommand == "fit"
        folder = self.folder if fit else self.folder / self.subcommand
        self._locks.enter_context(run_place(folder, folder / LAST_CHECKPOINT.parent if fit else folder))
        self.save_config_kwargs = {"folder": folder}

    # Building.

    def instantiate_classes(self) -> None:
        config = copy.deepcopy(self.config)
        data_checks.match_data_to_model(config[self.subcommand])
        try:
            self.config_init = self.parser.instantiate_classes(config)
        except ValueError as error:
            raise ValueError(innermost(str(error))) from error
        built = self.config_init[self.subcommand]
        self.datamodule = built.data
        data_checks.check_tokenizer_is_there(built.data, built.model)
        seed = 0 if built.seed_everything is False else built.seed_everything
        arguments = {name: built[name] for name in self._module_arguments}
        self.model = LayerSkipModule(built.model, seed=seed, **arguments)
        self.model.settings = settings_of(self._settings.as_dict())
        if self.resumed is not None:
            check_resumable(self.resumed, self.model, self.ckpt_path)
        data_checks.check_block_size(self.datamodule, self.model)
        data_checks.check_tokenizer(self.datamodule, self.model)
        self.trainer = self.instantiate_trainer()
        if self.subcommand == "fit":
            self._check_before_data()

    def _check_before_data(self) -> None:
        """Check now what would otherwise fail after the text is tokenized, or after the first steps."""
        steps = self.trainer.max_steps
        self.model.check_training(steps if steps > 0 else None)
        check_callbacks(self.trainer, self.model)
        check_monitors(self.trainer, self.model)
        if not self.trainer.fast_dev_run:
            check_room(self.folder, self.model, self.ckpt_path)

    def instantiate_trainer(self, **arguments) -> Trainer:
        built = self.config_init[self.subcommand]
        settings = {**built.trainer, **arguments}
        if settings["logger"] in (None, True):
            settings["logger"] = self._tensorboard()
        if settings["max_epochs"] is None and settings["max_steps"] == -1 and settings["max_time"] is None:
            settings["max_epochs"] = 1
        settings["default_root_dir"] = settings["default_root_dir"] or str(self.folder)
        methods = [built[key] for key in METHODS if built[key] is not None]
        checkpoint = [RunCheckpoint(self.folder / LAST_CHECKPOINT.parent, **built.checkpoint)]
        if self.subcommand == "fit":
            checkpoint.append(KeepTrainingRows(self.folder / LAST_CHECKPOINT.parent))
        if settings["enable_checkpointing"] is False:
            checkpoint = []
        hparams = [RunHparams(run_settings(self._settings.as_dict()))] if self.subcommand == "fit" else []
        bar = [StepBar()] if self.subcommand == "fit" and wants_bar(settings) else []
        with settings_named(settings):
            return watched(self._instantiate_trainer(settings, [*methods, LayerMetrics(), *hparams, *checkpoint, *bar]))

    def _tensorboard(self) -> RunLogger:
        if self.subcommand != "fit":
            logger, run = RunLogger(self.folder / self.subcommand, name="", version=""), run_of(self._settings.model)
            logger.steps = None if run is None else steps_of(run)
            return logger
        # Hides what an interrupted run logged after its last checkpoint: those steps are logged again.
        purge_step = None if self.resumed is None else self.resumed["global_step"] + 1
        return RunLogger(self.folder, name="", version="", purge_step=purge_step)

    # Running.

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "ckpt_path": self.ckpt_path}

    def fit(self, model: LayerSkipModule, **arguments) -> None:
        """Call Trainer.fit; after Ctrl-C the message says how to resume."""
        if self.resumed is not None and self.trainer.is_global_zero:
            say(resume_message(self.resumed["global_step"], self.changes, self.trainer.max_steps))
        advice = partial(how_to_go_on, self.trainer, self.folder / LAST_CHECKPOINT, "--ckpt_path last")
        with interruptible(self.trainer, advice), missing_monitor_named():
            self.trainer.fit(model, **arguments)
        print_end(self.trainer, self.folder)

    def validate(self, model: LayerSkipModule, **arguments) -> None:
        """Call Trainer.validate or Trainer.test."""
        with interruptible(self.trainer, lambda: " before all is measured; the same command begins anew"):
            getattr(self.trainer, self.subcommand)(model, **arguments)

    test = validate
