"""Help texts of `fit`, `validate` and `test` in place of Lightning's where those are missing or untrue."""

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
    """Set lskip's help texts for the options of `command`, which are those of `parser`."""
    options = {**_OPTIONS, "ckpt_path": _CHECKPOINT["fit" if command == "fit" else "other"]}
    for action in parser._actions:
        action.help = options.get(action.dest, action.help)
        if action.dest == "data.help":
            # Else it is the help of LightningDataModule, which has no arguments.
            action.const = f"lskip.data.{TextData.__name__}"
    for group in parser._action_groups:
        for beginning, title in _GROUPS.items():
            if (group.title or "").startswith(beginning):
                group.title = title
