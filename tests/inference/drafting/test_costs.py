"""The cost model against equations worked by hand, and its measurement against runners whose time is known."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from lskip.inference.drafting import costs as costs_module
from lskip.inference.drafting.costs import ROWS, Costs, RowCosts, measure_costs
from lskip.inference.drafting.costs_file import keep_costs, read_costs
from lskip.inference.drafting.draft import Draft, DraftPlan
from lskip.inference.drafting.registry import DRAFTERS, round_seconds
from lskip.inference.layers.linear import Plain
from lskip.inference.loading import load_generator
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder
from lskip.utils.output_files import write_json

LAYERS, WEIGHTS, NGRAM = Draft("layers", 3), Draft("weights", 8), Draft("ngram", 0)
ADAPTER = Draft("adapter", 3)
# block(n) = 1, 2, 4, 8 and head(n) = 10, 10, 30, 30 at n = 1, 2, 4, 8; the draft's are 1 and 5 throughout.
COSTS = Costs(
    10,
    RowCosts((1, 2, 4, 8), (1.0, 2.0, 4.0, 8.0), (10.0, 10.0, 30.0, 30.0)),
    RowCosts((1, 8), (1.0, 1.0), (5.0, 5.0)),
)
# With an adapter of 2 blocks, of which each takes .5 a row, and whose head takes 3.
WITH_ADAPTER = Costs(10, COSTS.model, COSTS.draft, RowCosts((1, 8), (0.5, 4.0), (3.0, 3.0)), 2)


def test_times_between_and_beyond_the_measured_ones():
    times = RowCosts((1, 2, 4, 8), (1.0, 2.0, 6.0, 8.0), (10.0, 10.0, 30.0, 20.0))
    assert [times.block_seconds(n) for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 4, 6, 6.5, 7.5]
    assert times.block_seconds(12) == 10  # on by (8 - 6) / (8 - 4) a row
    assert times.head_seconds(100) == 20  # times that fall by chance are not extrapolated downwards
    assert RowCosts((2, 4), (2.0, 3.0), (1.0, 1.0)).block_seconds(1) == 1.5
    # By the upper half of the table, not by its last two, whose difference may be chance.
    assert RowCosts((1, 4, 7, 8), (1.0, 4.0, 9.0, 8.0), (1.0,) * 4).block_seconds(10) == 10


@pytest.mark.parametrize(
    ("draft", "d", "slots", "seconds"),
    [
        (LAYERS, 1, 1, (3 + 10) + 3 + (7 * 2 + 10)),  # d c(3, 1) + b(3, 1) + V_3(2)
        (LAYERS, 3, 2, 3 * (3 * 2 + 10) + 3 * 2 + (7 * 8 + 30)),  # 8 rows in verification
        (WEIGHTS, 3, 1, 3 * (8 + 5) + (10 * 4 + 30)),  # d c'(8, 1) + V_0(4)
        (NGRAM, 3, 2, 10 * 8 + 30),  # V_0(8)
        (LAYERS, 0, 2, 10 * 2 + 10),
        (None, 0, 4, 10 * 4 + 30),
    ],
)
def test_rounds_by_hand(draft, d, slots, seconds):
    assert round_seconds(COSTS, DraftPlan(draft, d), slots) == seconds


@pytest.mark.parametrize(
    ("draft", "d", "slots", "seconds"),
    [
        # d (3 block(1) + head_a(1)) + 2 (block_a(d + 2) + (d - 1) block_a(1)) + b(3, 1) + V_3(2)
        (ADAPTER, 1, 1, (3 + 3) + 2 * 1.5 + 3 + (7 * 2 + 10)),
        (ADAPTER, 3, 2, 3 * (3 * 2 + 3) + 2 * (5 + 2 * 1) + 3 * 2 + (7 * 8 + 30)),
        # rounds of the other drafts cost the same
        (WEIGHTS, 3, 1, 3 * (8 + 5) + (10 * 4 + 30)),
        (NGRAM, 3, 2, 10 * 8 + 30),
        (None, 0, 4, 10 * 4 + 30),
    ],
)
def test_rounds_by_hand_with_an_adapter(draft, d, slots, seconds):
    assert round_seconds(WITH_ADAPTER, DraftPlan(draft, d), slots) == seconds


def test_times_of_long_texts():
    """A block of 1 and 4 rows takes 1 and 2 more behind 1024 positions than behind 128, so half of it behind 576."""
    times = RowCosts((1, 4), (1.0, 3.0), (10.0, 10.0), far=(2.0, 5.0))
    assert times.at(576).block == (1.5, 4.0) and times.at(1920).block == (3.0, 7.0) and times.at(5).block == (1.0, 3.0)
    assert times.at(576).head == times.head and COSTS.model.at(4000) == COSTS.model
    # Rounded weights attend to the same keys: three of their rounds and a verification, at 576 positions.
    costs = Costs(10, times, RowCosts((1, 4), (0.5, 0.5), (5.0, 5.0), far=(1.5, 1.5))).at(576)
    assert round_seconds(costs, DraftPlan(WEIGHTS, 3), 1) == 3 * (8 * 1.0 + 5) + (10 * 4.0 + 10)
    noisy = RowCosts((1, 4), (1.0, 3.0), (10.0, 10.0), far=(0.9, 5.0))
    assert noisy.at(4000).block[0] == 1.0  # longer texts are never cheaper


def test_rounds_by_hand_with_a_draft_head():
    """Few tokens take 2 behind the model's layers and 1 behind rounded weights; verification keeps the whole head."""
    model, draft = replace(COSTS.model, draft_head=(2.0,) * 4), replace(COSTS.draft, draft_head=(1.0, 1.0))
    costs = replace(COSTS, model=model, draft=draft)
    seconds = [round_seconds(costs, DraftPlan(each, 3), 1) for each in (LAYERS, WEIGHTS, NGRAM)]
    assert seconds == [3 * (3 + 2) + 3 + (7 * 4 + 30), 3 * (8 + 1) + (10 * 4 + 30), 10 * 4 + 30]


def test_parts_of_a_round():
    assert COSTS.plain(1) == COSTS.verify(0, 1) == 20
    drafting = [DRAFTERS[each.kind].seconds(each, 1, 2, COSTS) for each in (LAYERS, WEIGHTS, NGRAM)]
    assert drafting == [16 + 6, 13, 0]  # the states of the layers' last token are verification's too
    assert [COSTS.verify(done, 2) for done in (3, 0)] == [24, 30]


def test_draft_weights_that_were_not_measured():
    with pytest.raises(ValueError, match="costs: hold no times for draft weights"):
        round_seconds(Costs(10, COSTS.model), DraftPlan(WEIGHTS, 1), 1)
    with pytest.raises(ValueError, match="costs: hold no times for an exit adapter"):
        round_seconds(COSTS, DraftPlan(ADAPTER, 1), 1)


WITH_HEAD = Costs(10, replace(COSTS.model, draft_head=(2.0, 2.0, 3.0, 3.0)))
FAR = Costs(10, replace(COSTS.model, far=(2.0, 3.0, 5.0, 9.0)), COSTS.draft)


@pytest.mark.parametrize("costs", [COSTS, Costs(10, COSTS.model), WITH_ADAPTER, WITH_HEAD, FAR])
def test_json_round_trip(costs):
    assert Costs.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs
    assert Costs.from_dict(costs.to_dict()) == costs


def damaged(*path, value):
    saved = json.loads(json.dumps(WITH_ADAPTER.to_dict()))
    place = saved
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return saved


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([], "costs: .* num_layers, model, draft, adapter, adapter_blocks"),
        ({"num_layers": 3}, "costs: .* num_layers, model, draft, adapter, adapter_blocks"),
        (damaged("num_layers", value=0), "num_layers: 0 is not"),
        (damaged("model", value=None), "model, draft or adapter: None is not"),
        (damaged("draft", value={"rows": []}), "model, draft or adapter: .* rows, block, head"),
        (damaged("adapter", value={}), "model, draft or adapter: .* rows, block, head"),
        (damaged("adapter_blocks", value=0), "adapter_blocks: 0 is not"),
        (damaged("model", "rows", value="1248"), "rows: '1248' is not a list"),
        (damaged("model", "rows", 0, value="1"), "rows: '1' is not a whole number"),
        (damaged("model", "rows", 1, value=1), "rows: .* ascending"),
        (damaged("model", "block", value=[1.0]), "block: has 1 times for 4"),
        (damaged("model", "head", 2, value=-1.0), "head: -1.0 is not a number of seconds"),
        (damaged("model", "head", 2, value=float("nan")), "head: nan is not a number of seconds"),
        (damaged("model", "head", 2, value=None), "head: None is not a number of seconds"),
        (damaged("model", "draft_head", value=[1.0]), "draft_head: has 1 times for 4"),
        (damaged("model", "draft_head", value=2), "draft_head: 2 is not a list"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(saved, message):
    with pytest.raises(ValueError, match=message) as caught:
        Costs.from_dict(saved)
    assert str(caught.value).startswith("costs: ") and "\n" not in str(caught.value)


class Clock:
    """Stand-in for perf_counter, which only fake runners advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeRunner:
    """Runner that takes `block` + `row` n seconds for a block over n rows and `head` for the head, by `clock`.

    Behind 1024 positions a block takes `longer` more; such passes are not logged.
    """

    num_layers, device = 5, torch.device("cpu")

    def __init__(self, clock, block, row, head, name="model", log=None):
        self.clock, self.block, self.row, self.head, self.name = clock, block, row, head, name
        self.log = [] if log is None else log
        self.longer = 0.0
        self.hiccups = []  # numbers of runs that take 50 times as long

    def new_cache(self, slots, cells):
        assert slots == 1 and cells >= 1024 + max(ROWS)
        self.cache = object()
        return self.cache

    def embed(self, ids, starts):
        assert ids.shape[0] == 1
        return torch.zeros(*ids.shape, 4)

    def run(self, x, cache, starts, first, last):
        assert torch.is_inference_mode_enabled()
        assert cache is self.cache and (first, last) == (0, self.num_layers)
        if starts != [128]:
            assert starts == [1024]
            self.clock.now += self.num_layers * (self.block + self.row * x.shape[1] + self.longer)
            return x
        slow = 50 if len(self.log) in self.hiccups else 1
        self.log.append((self.name, x.shape[1]))
        self.clock.now += slow * self.num_layers * (self.block + self.row * x.shape[1])
        return x

    def argmax(self, x):
        self.clock.now += self.head
        return x


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(costs_module, "perf_counter", made)
    return made


def test_measures_all_weights_as_they_are(clock):
    adapter = FakeRunner(clock, 2e-5, 1e-5, 2e-4)
    costs = measure_costs(
        FakeRunner(clock, 1e-4, 1e-5, 3e-4), FakeRunner(clock, 5e-5, 2e-5, 1e-4), adapter_runner=adapter
    )
    assert (costs.num_layers, costs.adapter_blocks) == (5, 5)
    assert costs.adapter.block_seconds(7) == pytest.approx(9e-5) and costs.adapter.head_seconds(7) == pytest.approx(
        2e-4
    )
    assert costs.model.rows == costs.draft.rows == ROWS
    for rows in (1, 7, 64, 100):
        assert costs.model.block_seconds(rows) == pytest.approx(1e-4 + 1e-5 * rows)
        assert costs.draft.block_seconds(rows) == pytest.approx(5e-5 + 2e-5 * rows)
    assert costs.model.head_seconds(3) == pytest.approx(3e-4)
    assert costs.draft.head_seconds(3) == pytest.approx(1e-4)
    assert clock.now < 4
    alone = measure_costs(FakeRunner(clock, 1e-4, 1e-5, 3e-4), adapter_runner=adapter)
    assert alone.draft is None and alone.adapter is not None
    alone = measure_costs(FakeRunner(clock, 1e-4, 1e-5, 3e-4))
    assert (alone.draft, alone.adapter, alone.adapter_blocks) == (None, None, 0)


def test_long_texts_are_measured(clock):
    runner = FakeRunner(clock, 1e-4, 1e-5, 3e-4)
    runner.longer = 7e-5
    costs = measure_costs(runner)
    assert costs.at(1024).plain(1) == pytest.approx(5 * (1.1e-4 + 7e-5) + 3e-4)
    assert costs.at(128) == costs and costs.at(1920).model.block_seconds(3) == pytest.approx(1.3e-4 + 14e-5)


def test_rounds_are_interleaved_and_a_hiccup_does_not_count(clock):
    log = []
    times = 2**-13, 2**-17, 2**-12  # whose sums are exact
    model, draft = FakeRunner(clock, *times, "model", log), FakeRunner(clock, *times, "draft", log)
    warm_up = 2 * (len(ROWS) + 1)
    model.hiccups = [0, warm_up + 2, warm_up + 2 * len(ROWS) + 5]
    costs = measure_costs(model, draft)
    assert costs.model == costs.draft
    one_round = [(name, rows) for name in ("model", "draft") for rows in ROWS]
    assert log[warm_up:] == one_round * 9


@pytest.mark.parametrize("block", [0.002, 0.01, 0.03])
@pytest.mark.parametrize("with_draft", [False, True])
def test_a_slow_model_is_measured_at_fewer_rows_and_in_time(clock, block, with_draft):
    model = FakeRunner(clock, block, block / 4, block)
    draft = FakeRunner(clock, block / 2, block / 8, block) if with_draft else None
    costs = measure_costs(model, draft, seconds=4.0)
    assert clock.now <= 4.0
    assert 2 <= len(costs.model.rows) <= len(ROWS) and costs.model.rows == ROWS[: len(costs.model.rows)]
    assert len(costs.model.rows) < len(ROWS) or block < 0.01
    assert costs.model.block_seconds(64) == pytest.approx(block * 17)  # beyond the measured rows: on a line


def test_a_very_slow_model_is_still_measured_at_two_rows(clock):
    costs = measure_costs(FakeRunner(clock, 1.0, 0.5, 1.0))
    assert costs.model.rows == (1, 2)
    assert costs.plain(1) == pytest.approx(5 * 1.5 + 1)


def test_waits_for_a_device_around_each_timing(clock, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    runner = FakeRunner(clock, 1e-4, 1e-5, 3e-4)
    measure_costs(runner)
    assert not waits
    runner.device = torch.device("meta")
    calls = len(runner.log)
    measure_costs(runner)
    assert waits == [runner.device] * 4 * (len(runner.log) - calls)


class RunnerWithLogits(FakeRunner):
    """Runner that needs all logits for an argmax: half of the head's time to compute, half to search them."""

    def argmax(self, x):
        return None

    def decode(self, x):
        self.clock.now += self.head / 2
        return SlowLogits(self)


class SlowLogits:
    def __init__(self, runner):
        self.runner = runner

    def argmax(self, dim):
        assert dim == -1
        self.runner.clock.now += self.runner.head / 2


def test_choosing_a_token_is_part_of_the_heads_time(clock):
    costs = measure_costs(RunnerWithLogits(clock, 1e-4, 1e-5, 3e-4))
    assert costs.model.head == pytest.approx([3e-4] * len(ROWS))


def test_the_draft_head_is_timed_beside_the_heads(clock):
    """The runner's own head takes 3e-4, the draft's 1e-5, on the same blocks."""

    class Head:
        token_ids, vocab_size = torch.arange(2), 9

        def __call__(self, x):
            clock.now += 1e-5
            return x[..., :2]

    runner = FakeRunner(clock, 1e-4, 1e-5, 3e-4)
    runner.norm = lambda x: x
    costs = measure_costs(runner, draft_head=Head())
    assert costs.model.draft_head == pytest.approx([1e-5] * len(ROWS))
    assert costs.model.head == pytest.approx([3e-4] * len(ROWS))
    assert costs.model.block_seconds(7) == pytest.approx(1e-4 + 7e-5)


@pytest.mark.parametrize("make_runner", [lambda decoder: FusedRunner(decoder, [Plain]), ModuleRunner])
def test_measures_real_runners(tiny_model, make_runner):
    runner = make_runner(Decoder(tiny_model("llama")))
    costs = measure_costs(runner, runner, seconds=0.5)
    assert costs.num_layers == 4
    assert Costs.from_dict(costs.to_dict()) == costs
    assert round_seconds(costs, DraftPlan(Draft("weights", 4), 2), 1) > 0 and costs.plain(1) > 0


def test_costs_are_kept_in_a_file(clock, tmp_path):
    path = tmp_path / "costs" / "here.json"
    runner = FakeRunner(clock, 1e-4, 1e-5, 3e-4)
    costs = keep_costs(path, runner)
    runs = len(runner.log)
    assert keep_costs(path, runner) == costs
    assert {rows for _, rows in runner.log[runs:]} == {1}  # read, not measured again
    with pytest.raises(ValueError, match=r"costs_file: .* other draft_weights"):
        keep_costs(path, runner, runner)
    with pytest.raises(ValueError, match=r"costs_file: .* other draft_tokens"):
        keep_costs(path, runner, draft_head=lambda x: x)
    adapter, other = FakeRunner(clock, 1e-5, 1e-6, 1e-5), tmp_path / "with_adapter.json"
    with pytest.raises(ValueError, match=r"costs_file: .* another exit_adapter"):
        keep_costs(path, runner, None, adapter)
    measured = keep_costs(other, runner, None, adapter)
    assert measured == keep_costs(other, runner, None, adapter) and measured.adapter_blocks == 5
    both, third = FakeRunner(clock, 1e-5, 1e-6, 1e-5), tmp_path / "with_weights.json"
    both.layout = "int8"
    keep_costs(third, runner, both)
    both.layout = "int4"
    with pytest.raises(ValueError, match=r"costs_file: .* other draft_weights"):
        keep_costs(third, runner, both)
    runner.device = torch.device("meta")
    with pytest.raises(ValueError, match=r"costs_file: .* measured on 'cpu', not on 'meta'"):
        keep_costs(path, runner)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"costs_file: .* is not JSON"):
        keep_costs(path, runner)


@pytest.mark.parametrize("drafts", [False, True])
def test_costs_of_a_busy_machine_are_measured_again(clock, tmp_path, drafts):
    """Red where they stay for ever: no draft would seem to pay. What a policy learnt stays, as do better costs."""
    path, runner = tmp_path / "costs.json", FakeRunner(clock, 1e-4, 1e-5, 3e-4)
    draft = FakeRunner(clock, 1e-5, 1e-6, 3e-4) if drafts else None
    slow = draft or runner
    quiet = slow.block
    slow.block = 40 * quiet
    busy = keep_costs(path, runner, draft)
    write_json(path, json.loads(path.read_text()) | {"learnt": {"drafts": {}, "extra": {}}})
    slow.block = quiet
    again = keep_costs(path, runner, draft)
    assert again.model.block_seconds(1) == pytest.approx(1.1e-4) and again != busy
    if drafts:
        assert again.draft.block_seconds(1) == pytest.approx(1.1e-5)
    assert json.loads(path.read_text())["learnt"] == {"drafts": {}, "extra": {}} and read_costs(path)[1] == again
    slow.block = 40 * quiet
    assert keep_costs(path, runner, draft) == again


GOOD = {"num_layers": 5, "model": {"rows": [1, 64], "block": [1e-4, 1e-3], "head": [1e-4, 1e-3]}}
GOOD |= {"draft": None, "adapter": None, "adapter_blocks": 0}


def with_times(*block) -> str:
    costs = GOOD | {"model": GOOD["model"] | {"block": block}}
    return json.dumps({"device": "cpu", "costs": costs})


DAMAGED = {
    "B18 cut": with_times(1e-4, 1e-3)[:60],
    "garbage": b"\x80\x02\xff",
    "a list": "[]",
    "a number": "5",
    "another table": '{"a": 1}',
    "no costs": '{"device": "cpu", "costs": null}',
    "NaN": with_times(1e-4, float("nan")),
    "infinity": with_times(1e-4, float("inf")),
    "negative": with_times(-1e-4, 1e-3),
    "a text": with_times("fast", 1e-3),
    "too few": with_times(1e-4),
    "5000 digits": '{"device": ' + "9" * 5000 + "}",
    "a device that is a number": json.dumps({"device": 5, "costs": GOOD}),
    "rows in words": json.dumps({"device": "cpu", "costs": GOOD | {"model": GOOD["model"] | {"rows": ["a", "b"]}}}),
    "no layers": json.dumps({"device": "cpu", "costs": GOOD | {"num_layers": 0}}),
}


@pytest.mark.kind("B18 damaged caches and files")
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, content):
    monkeypatch.setattr("lskip.models.pretrained.load_model", None)
    path = tmp_path / "costs.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"costs_file: .*costs\.json'.*; remove it to measure again"):
        load_generator("smollm2", costs_file=str(path))


@pytest.mark.kind("B18 damaged caches and files", "B41")
def test_a_folder_for_a_costs_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"costs_file: '/.*' is a folder, not a JSON file"):
        load_generator("smollm2", costs_file=str(tmp_path))


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written", "B11")
def test_costs_that_cannot_be_kept_stop_nothing(clock, tmp_path, monkeypatch, capsys):
    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("lskip.utils.output_files.Path.write_bytes", refuse)
    costs = keep_costs(tmp_path / "costs.json", FakeRunner(clock, 1e-4, 1e-5, 3e-4))
    assert costs.num_layers == 5 and not list(tmp_path.iterdir())
    assert "warning: costs_file: is not kept" in capsys.readouterr().err


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written")
def test_a_place_where_no_costs_can_be_kept_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    def refuse(**where):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("lskip.utils.output_files.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"costs_file: cannot write '.*' \(Read-only file system\)"):
        load_generator("smollm2", costs_file=str(tmp_path / "costs.json"))


@pytest.mark.kind("B5 B13 two writers")
def test_two_that_measure_at_once_leave_a_whole_file(tmp_path):
    content = {"device": "cpu", "costs": GOOD}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write_json(tmp_path / "costs.json", content), range(200)))
    assert read_costs(tmp_path / "costs.json")[0] == "cpu"
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
