"""What `--help` of `fit`, `validate` and `test` says where the words of Lightning would be none, or untrue here."""

from __future__ import annotations

from argparse import ArgumentParser

from lskip.data import TextData

_OPTIONS = {
    "data": "TextData (--data.source FILE, --data.block_size 256 …; --data.help explains its arguments), "
    "or a LightningDataModule of your own by its import path.",
    "layer_dropout": "LayerDropout; --layer_dropout.help explains its arguments. null: none.",
    "early_exit_loss": "EarlyExitLoss; --early_exit_loss.help explains its arguments. null: the last exit alone.",
    "trainer.max_epochs": "epochs at most; null: 1, or as many as max_steps or max_time take where one is set",
    "trainer.default_root_dir": "null: the run_folder",
    "weights_only": "true or null: code of a checkpoint never runs, and false is refused",
}
_CHECKPOINT = {
    "fit": "checkpoint of a run that goes on from there: a file, or last, which is the one in run_folder",
    "other": "checkpoint that is measured: a file, or last, which is the one in run_folder; null: what model names",
}
_GROUPS = {"A DataModule": "What is trained on and measured with", "Runs the full": "How a run goes on"}


def explain_options(parser: ArgumentParser, command: str) -> None:
    """Put lskip's own words into the help of `command`, whose options `parser` knows."""
    options = {**_OPTIONS, "ckpt_path": _CHECKPOINT["fit" if command == "fit" else "other"]}
    for action in parser._actions:
        action.help = options.get(action.dest, action.help)
        if action.dest == "data.help":
            action.const = f"lskip.data.{TextData.__name__}"  # the base class, the default, has no arguments
    for group in parser._action_groups:
        for beginning, title in _GROUPS.items():
            if (group.title or "").startswith(beginning):
                group.title = title
