"""A user's own batches: what would train something else, or fail far from its cause, is refused by its key."""

import pytest
import torch
from torch.utils.data import DataLoader

from lskip.module import LayerSkipModule
from lskip.training.batch_checks import check_batch
from tests.trainers import quiet_trainer

IDS = torch.arange(12).view(2, 6)
RIGHT = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
REFUSED = {
    "a tuple": ((IDS, IDS), "data: a batch is a tuple"),
    "no ids": ({"ids": IDS}, "data: a batch is a dict"),
    "rows without a batch": ({"input_ids": IDS[0]}, "input_ids: .*not as \\[B, S\\]"),
    "no row": ({"input_ids": IDS[:0]}, "input_ids: .*\\[0, 6\\]; .* -100"),
    "no column": ({"input_ids": IDS[:, :0]}, "input_ids: .*\\[2, 0\\]; "),
    "numbers": ({"input_ids": IDS.float()}, "input_ids: .*torch.float32"),
    "an id beyond the vocabulary": ({"input_ids": IDS + 60}, "input_ids: a batch has 64, allowed are 0 to 63"),
    "a label beyond it": ({"input_ids": IDS, "labels": IDS + 60}, "labels: a batch has 64"),
    "-1, where -100 is known": ({"input_ids": IDS, "labels": IDS - 1}, "labels: a batch has -1, .* or -100"),
    "labels that were shifted": ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels: .*aligned"),
    "labels, a list": ({"input_ids": IDS, "labels": IDS.tolist()}, "labels: .*list"),
    "padding at the left": ({"input_ids": IDS, "attention_mask": RIGHT.flip(1)}, "attention_mask: .*right"),
    "positions that go on": ({"input_ids": IDS, "position_ids": torch.arange(12).view(2, 6)}, "position_ids: .*from 0"),
    "positions with a gap": ({"input_ids": IDS, "position_ids": torch.arange(6)[None] * 2}, "position_ids: .*0, 1, 2"),
    "positions of no rows": ({"input_ids": IDS, "position_ids": torch.arange(6)}, "position_ids: .*\\[6\\], and"),
    "positions in a list": ({"input_ids": IDS, "position_ids": [0, 1]}, "position_ids: .* list, and"),
}


@pytest.mark.parametrize(("batch", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_by_its_key(batch, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        check_batch(batch, 64)


def test_what_collators_of_others_send_passes():
    labels = IDS.masked_fill(RIGHT == 0, -100)
    check_batch(
        {"input_ids": IDS, "labels": labels, "attention_mask": RIGHT, "position_ids": torch.arange(6)[None]}, 64
    )
    check_batch({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 1, 2]])}, 64)


def test_each_batch_of_a_run_is_checked(tiny_model, tmp_path):
    """Red where only the first one is: a collator pads at the left as soon as lengths differ."""
    rows = [{"input_ids": IDS}, {"input_ids": IDS, "attention_mask": RIGHT.flip(1)}]
    with pytest.raises(ValueError, match=r"^attention_mask: "):
        quiet_trainer(tmp_path, max_steps=2).fit(LayerSkipModule(tiny_model()), DataLoader(rows, batch_size=None))
