"""The compared methods: training and exit criteria of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lskip.callbacks import AlternatingExits, EarlyExitLoss, LayerDropout, TwoStages
from lskip.curricula import Rotational
from lskip.inference import Entropy, LearnedExit, Margin, Saturation
from lskip.inference.exit_criteria import ExitCriterion
from lskip.module import LayerSkipModule
from lskip.optimization import WarmupCosine
from lskip.task_module import Classification, Regression, TaskModule

STAGES = 2  # of DeeBERT: as many steps as the others take, then as many, cheaper ones, for the exits
SURE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
UNSURE = tuple(round(1 - share, 3) for share in reversed(SURE))
ALIKE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99, 0.995)


class DepthWeights(Callback):
    """CALM's loss (arXiv 2207.07061, section 3.5): all exits at every step, exit i with weight i / Σ j."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = len(pl_module.exit_weights.values)
        total = layers * (layers + 1) / 2
        pl_module.exit_weights.write(self, [layer / total for layer in range(1, layers + 1)])


@dataclass(frozen=True)
class Criterion:
    """One of the classes of lskip.inference.exit_criteria, and the thresholds at which it is scored."""

    kind: Callable[..., ExitCriterion]
    thresholds: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.kind.__name__

    def at(self, threshold: float, first: int) -> ExitCriterion:
        return self.kind(threshold, first=first)


@dataclass(frozen=True)
class Arm:
    """A method.

    Attributes:
        callbacks: makes what its training adds to a plain one's.
        criteria: what may decide the exit. Every arm is also scored at each fixed exit.
        exit_heads, learned_exit: as in LayerSkipModule.
        stages: parts of its training, each as long as that of the others.
        first: the first exit at which its criteria look.
    """

    callbacks: Callable[[], list[Callback]]
    criteria: tuple[Criterion, ...]
    exit_heads: bool = False
    learned_exit: bool = False
    stages: int = 1
    first: int = 1


MARGIN, SATURATION = Criterion(Margin, SURE), Criterion(Saturation, ALIKE)
ARMS = {
    "DeeBERT": Arm(lambda: [TwoStages(1 / STAGES)], (Criterion(Entropy, UNSURE),), exit_heads=True, stages=STAGES),
    "BERxiT": Arm(lambda: [AlternatingExits()], (Criterion(LearnedExit, SURE),), learned_exit=True),
    "CALM": Arm(lambda: [DepthWeights()], (MARGIN, SATURATION)),
    "LayerSkip": Arm(
        lambda: [LayerDropout(p_max=0.1), EarlyExitLoss(e_scale=1.0, curriculum=Rotational(4))],
        (MARGIN, SATURATION),
        first=2,  # the exit after block 1 is never trained
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of models, data and training, the same in all arms.

    Attributes:
        source, vocab_size: of the language model's text.
        layers, width: of the model.
        steps, batch_size, block_size: of the language model's training.
        task_steps, task_batch_size, per_template: of the sentences'.
        texts, context, new_tokens: held-out texts on which decoding is scored, and their parts.
        lr: highest learning rate.
    """

    source: str = "stdlib"
    vocab_size: int = 2048
    layers: int = 8
    width: int = 128
    steps: int = 600
    batch_size: int = 8
    block_size: int = 128
    task_steps: int = 300
    task_batch_size: int = 48
    per_template: int = 24
    texts: int = 32
    context: int = 32
    new_tokens: int = 96
    lr: float = 3e-3


def model_config(sizes: Sizes, vocab_size: int) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": sizes.width,
        "intermediate_size": 3 * sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def train(
    arm: Arm,
    task: Classification | Regression | None,
    sizes: Sizes,
    vocab_size: int,
    steps: int,
    seed: int,
    batches: DataLoader,
) -> LayerSkipModule:
    """One arm's model, from the same first weights as the others' with this seed; `task` None: a language model."""
    seed_everything(seed, verbose=False)
    settings = {
        "optimizer": partial(torch.optim.AdamW, lr=sizes.lr, betas=(0.9, 0.95), weight_decay=0.1),
        "lr_scheduler": partial(WarmupCosine, warmup_steps=max(1, steps // 20), stages=arm.stages),
        "learned_exit": arm.learned_exit,
        "seed": seed,
    }
    config = model_config(sizes, vocab_size)
    if task is None:
        module = LayerSkipModule(config, exit_heads=arm.exit_heads, **settings)
    else:
        module = TaskModule(config, task, **settings)
    trainer = Trainer(
        max_steps=steps * arm.stages,
        max_epochs=-1,
        callbacks=arm.callbacks(),
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, batches)
    return module.eval()
