"""Planned memory against the bytes of a real tiny model, its gradients, its optimizer and a step's own tensors."""

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory.peak import peak_bytes
from lskip.low_rank import LowRank
from lskip.models.families import FAMILIES
from lskip.models.reading.config import build_config
from lskip.module import LayerSkipModule
from lskip.optimization import parameter_groups
from lskip.planning.memory import DDP, FSDP2, SINGLE, peak_memory, shard_bytes
from lskip.planning.simulation import Batch, module_of, simulate
from tests.conftest import make_config, make_model

ADAMW = partial(torch.optim.AdamW, lr=1e-3)
SIZES = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64, "n_inner": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
}
LAST = [0.0, 0.0, 0.0, 1.0]
BATCH = Batch(2, 16)


def planned(family="llama", batch=BATCH, precision="32-true", on_gpu=False, exits=LAST, model=None, **settings):
    """Return a module without values, and what its simulated steps hold."""
    sizes = {**SIZES.get(family, {}), **(model or {})}
    arguments = {"optimizer": ADAMW, **settings}
    module = module_of(build_config(make_config(family, **sizes), "model."), arguments, precision)
    module.exit_weights.values = list(exits)
    return module, simulate(module, batch, precision, on_gpu)


def real_bytes(module: LayerSkipModule, rows=2, length=16) -> tuple[int, int, int]:
    """Return the bytes of weights (and buffers), gradients and optimizer states after a real step."""
    optimizer = module.optimizer(parameter_groups(module))
    module.early_exit_loss({"input_ids": torch.zeros(rows, length, dtype=torch.long)}, 0)[0].backward()
    optimizer.step()
    weights = {part.data_ptr(): part for part in [*module.parameters(), *module.buffers()] if part.numel()}
    gradients = [part.grad for part in module.parameters() if part.grad is not None]
    states = [part for state in optimizer.state.values() for part in state.values()]
    return tuple(
        sum(part.untyped_storage().nbytes() for part in parts) for parts in (weights.values(), gradients, states)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_gradients_and_states_are_the_bytes_of_a_real_step(family):
    module, simulated = planned(family)
    found = peak_memory(module, simulated, SINGLE, 1)
    config = AutoConfig.for_model(**make_config(family, **SIZES.get(family, {})))
    real = real_bytes(LayerSkipModule(AutoModelForCausalLM.from_config(config), optimizer=ADAMW))
    assert (found["weights"], found["gradients"], found["optimizer"]) == real


@pytest.mark.parametrize(
    "settings",
    [
        {"low_rank": LowRank(exit_layer=2, rank=4)},
        {"exit_heads": True, "learned_exit": True},
        {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
        {"optimizer": partial(torch.optim.AdamW, lr=0.1, fused=True)},
    ],
    ids=["LoRA", "exit heads and classifier", "SGD", "fused"],
)
def test_what_trains_and_how_is_counted(settings):
    exits = [0.0, 0.25, 0.25, 0.5]
    module, simulated = planned(exits=exits, **settings)
    found = peak_memory(module, simulated, SINGLE, 1)
    real = LayerSkipModule(make_model(), **{"optimizer": ADAMW, **settings})
    real.exit_weights.values = exits
    assert (found["weights"], found["gradients"], found["optimizer"]) == real_bytes(real)


def test_weights_gradients_and_states_of_7b_are_exact():
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    config |= {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096}
    module = module_of(build_config(config, "model."), {"optimizer": ADAMW, "gradient_checkpointing": True}, "32-true")
    count, tensors = sum(part.numel() for part in module.parameters()), len(list(module.parameters()))
    assert count == 6_738_415_616
    buffers = sum(part.numel() * part.element_size() for part in module.buffers())
    simulated = simulate(module, Batch(1, 64), "32-true", True)
    found = peak_memory(module, simulated, SINGLE, 1)
    assert found["weights"] == 4 * count + buffers
    assert found["gradients"] == 4 * count
    assert found["optimizer"] == 8 * count + 4 * tensors  # and the numbers of steps
    of_8 = peak_memory(module, simulated, FSDP2, 8)
    assert of_8["weights"] == 4 * count / 8 + buffers  # 8 divides all first dimensions
    assert of_8["gradients"] == 4 * count / 8
    assert of_8["optimizer"] == 8 * count / 8 + 4 * tensors
    assert peak_memory(module, simulated, DDP, 8)["buckets"] == 4 * count


@pytest.mark.parametrize(
    ("settings", "accumulate"),
    [({}, 1), ({"gradient_checkpointing": True}, 1), ({"anchor_weight": 0.5}, 1), ({"position_share": 0.5}, 2)],
    ids=["plain", "checkpointing", "anchor", "accumulated, sampled"],
)
def test_the_peak_is_that_of_a_real_second_step(settings, accumulate):
    """Red where gradients of the step before, activations or the head's buffers are left out."""
    exits, model = [0.0, 0.25, 0.25, 0.5], {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 2000}
    module, simulated = planned(batch=Batch(4, 64, accumulate), exits=exits, model=model, **settings)
    found = sum(peak_memory(module, simulated, SINGLE, 1).values())
    real = LayerSkipModule(make_model(**model), optimizer=ADAMW, **settings)
    real.exit_weights.values = exits
    optimizer = real.optimizer(parameter_groups(real))
    ids = torch.randint(0, 2000, (4, 64), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        for number in range(accumulate):
            loss, _ = real.early_exit_loss({"input_ids": ids}, number)
            if number == 0:
                optimizer.zero_grad()
            loss.backward()
        optimizer.step()

    step()
    models = [real, *real.supervision.teachers()]
    there = [*(part for each in models for part in [*each.parameters(), *each.buffers()])]
    there += [part.grad for part in real.parameters() if part.grad is not None]
    there += [part for state in optimizer.state.values() for part in state.values()]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in there}
    measured = sum(storages.values()) + peak_bytes(step, torch.device("cpu"))
    assert found == pytest.approx(measured, rel=0.1)


def test_fsdp2_sums_gradients_of_several_micro_batches_whole():
    one, two = (peak_memory(*planned(batch=Batch(2, 16, count)), FSDP2, 4) for count in (1, 2))
    assert two["weights"] == one["weights"]
    trained = sum(part.numel() for part in planned()[0].parameters())
    assert two["gradients"] == 4 * trained > 3 * one.get("gradients", 0)


def test_a_gpu_holds_larger_chunks_of_logits_and_steps_on_lists():
    exits, model = [0.0, 0.25, 0.25, 0.5], {"vocab_size": 20_000}
    on_cpu, on_gpu = (
        peak_memory(*planned(batch=Batch(32, 64), exits=exits, model=model, on_gpu=gpu), SINGLE, 1)
        for gpu in (False, True)
    )
    assert on_gpu["exits"] > 2 * on_cpu["exits"]


def test_16_bits_halve_the_weights_or_are_copies_of_them():
    full, mixed, true = (
        peak_memory(*planned(precision=precision), SINGLE, 1) for precision in ("32-true", "bf16-mixed", "bf16-true")
    )
    module = module_of(build_config(make_config(), "model."), {}, "32-true")
    matrices = sum(part.numel() for part in module.decoder.blocks.parameters() if part.ndim == 2)
    assert mixed["weights"] == full["weights"]
    assert mixed["casts"] == 2 * (matrices + module.decoder.head_weight.numel())
    assert true["gradients"] == full["gradients"] / 2


@pytest.mark.parametrize(("shape", "devices", "expected"), [((8, 3), 4, 24), ((9, 3), 4, 36), ((), 4, 4), ((2,), 4, 4)])
def test_a_share_is_a_part_of_the_rows_rounded_up(shape, devices, expected):
    size = 4 * torch.Size(shape).numel()
    assert shard_bytes(torch.Size(shape), size, devices) == expected


def test_adafactor_is_measured_on_a_small_matrix():
    """Its rows' and columns' means do not grow with the matrix: the small one says too much of a large one."""
    assert planned(optimizer=partial(torch.optim.Adafactor, lr=0.1))[1].states_estimated > 0


def test_an_optimizer_that_needs_values_is_measured_on_a_small_matrix():
    module, simulated = planned(optimizer=partial(_NeedsValues, lr=0.1))
    trained = sum(part.numel() for part in module.parameters())
    assert simulated.states_estimated == pytest.approx(4 * trained, rel=0.01)
    assert peak_memory(module, simulated, SINGLE, 1)["optimizer"] == simulated.states_estimated


class _NeedsValues(torch.optim.SGD):
    """SGD that asks for a value, as optimizers in 8 bits do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for part in group["params"]:
                if part.grad is not None and part.grad.abs().max().item() >= 0:
                    self.state[part]["average"] = torch.zeros_like(part)
