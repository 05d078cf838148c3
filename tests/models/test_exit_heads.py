"""Exit heads and the exit classifier: their effect, their loss, and how they are saved and loaded."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lskip.callbacks import RunCheckpoint
from lskip.export.to_hf import export
from lskip.inference import load_generator
from lskip.models.decoder import Decoder
from lskip.models.exit_heads import TrainedExits, load_trained_exits, rebuilt
from lskip.models.pretrained import load_model
from lskip.models.readout import read_exits
from lskip.module import LayerSkipModule

IDS = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))


def scrambled(exits):
    """Return `exits` with all parameters changed at random, in place."""
    torch.manual_seed(7)
    for parameter in exits.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return exits


def states_of(model, ids):
    """Return the states of all positions after each block, by transformers alone."""
    seen = []
    hooks = [layer.register_forward_hook(lambda *call: seen.append(call[2])) for layer in model.model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return [states[0] if isinstance(states, tuple) else states for states in seen]


def test_new_heads_change_nothing(tiny_model):
    model = tiny_model()
    plain, headed = LayerSkipModule(model), LayerSkipModule(model, exit_heads=True)
    for module in (plain, headed):
        module.exit_weights.write("test", [0.1, 0.2, 0.3, 0.4])
    assert torch.equal(
        plain.early_exit_loss({"input_ids": IDS}, 0)[0], headed.early_exit_loss({"input_ids": IDS}, 0)[0]
    )


def test_loss_of_heads_and_classifier_by_hand(tiny_model):
    model = tiny_model()
    module = LayerSkipModule(model, exit_heads=True, learned_exit=True)
    weights = [0.1, 0.0, 0.3, 0.6]
    module.exit_weights.write("test", weights)
    exits, expected, classified = scrambled(module.exits), 0.0, []
    for block, states in enumerate(states_of(model, IDS)):
        if not weights[block]:
            continue
        affine = exits.heads.maps[block] if block < 3 else torch.nn.Identity()
        logits = model.lm_head(model.model.norm(affine(states)))[:, :-1].flatten(0, 1)
        labels = IDS[:, 1:].flatten()
        expected += weights[block] * torch.nn.functional.cross_entropy(logits, labels)
        if block < 3:  # the last exit is always taken
            right = (logits.argmax(-1) == labels).float()
            classified.append((exits.classifier(states[:, :-1].flatten(0, 1)) - right).square().mean())
    loss, _ = module.early_exit_loss({"input_ids": IDS}, 0)
    torch.testing.assert_close(loss, expected + sum(classified) / len(classified))
    (gradient,) = torch.autograd.grad(loss, exits.classifier.linear.weight, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(classified) / 2, exits.classifier.linear.weight)[0])


def test_validation_reads_through_the_heads(tiny_model):
    model = tiny_model()
    exits = scrambled(TrainedExits(4, 32, heads=True, classifier=False))
    found = read_exits(Decoder(model), IDS, None, [2, 4], exits)
    state = states_of(model, IDS)[1]
    by_hand = model.lm_head(model.model.norm(exits.heads.maps[1](state)))[:, :-1].argmax(-1).flatten()
    assert torch.equal(found.predictions[0], by_hand)
    assert torch.equal(found.predictions[1], read_exits(Decoder(model), IDS, None, [4]).predictions[0])


@pytest.fixture
def run(tmp_path, tiny_config, tiny_tokenizer):
    """Return a run folder with heads and a classifier, and the module that wrote it."""
    module = LayerSkipModule(tiny_config(), tiny_tokenizer, exit_heads=True, learned_exit=True)
    scrambled(module.exits)
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        callbacks=[RunCheckpoint(tmp_path / "run" / "checkpoints")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([{"input_ids": IDS}], batch_size=None))
    return tmp_path / "run", module


def test_a_run_and_its_export_bring_their_exits(run, tmp_path):
    folder, module = run
    export(str(folder), str(tmp_path / "out"))
    for source in (str(folder), str(tmp_path / "out")):
        model, _ = load_model(source)  # an ordinary model, whatever lies beside it
        found = load_trained_exits(source, Decoder(model))
        for name, part in module.exits.state_dict().items():
            assert torch.equal(found.state_dict()[name], part)
        again = LayerSkipModule(source)  # nothing asked for: they come with it
        assert torch.equal(again.exits.heads.maps[1].weight, module.exits.heads.maps[1].weight)
        assert load_generator(source, device="cpu").trained_exits.classifier is not None


def test_a_part_that_is_asked_for_joins_what_is_there(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    own = scrambled(TrainedExits(4, 32, heads=True, classifier=False))
    own.save(tmp_path)
    module = LayerSkipModule(str(tmp_path), learned_exit=True)
    assert module.exits.classifier is not None
    assert torch.equal(module.exits.heads.maps[2].weight, own.heads.maps[2].weight)


def test_a_model_without_exits_has_none(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert load_trained_exits(str(tmp_path), Decoder(tiny_model())) is None
    assert LayerSkipModule(str(tmp_path)).exits is None


def test_exits_of_another_model_are_refused(tiny_model):
    weights = TrainedExits(6, 32, heads=True, classifier=True).state_dict()
    with pytest.raises(ValueError, match="model: the exits in 'there' do not fit the model"):
        rebuilt(weights, Decoder(tiny_model()), "there")
