"""A callback that records the texts that a run is trained on, named by class_path in the cases."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback

NOT_SCORED = -100


class SeenText(Callback):
    """A callback that writes the text of each row of each batch to `path`, and that of its scored tokens."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        decode = pl_module.tokenizer.decode
        with self.path.open("a", encoding="utf-8") as file:
            for ids, labels in zip(batch["input_ids"], batch.get("labels", batch["input_ids"]), strict=True):
                scored = decode(labels[labels != NOT_SCORED])
                file.write(json.dumps({"text": decode(ids), "scored": scored}) + "\n")
