"""Allowed values of the options of a run's data."""

from benchmarks.bad_input.values import choice, file_to_read, flag, place_to_write, real, whole

DATA = {
    "source": file_to_read(),
    "tokenizer": file_to_read(good=("null", "{place}/llama")),
    "vocab_size": whole(257, good=(300,)),
    "block_size": whole(2, 128, good=(2, 32)),  # of 128 the corpus fills too few
    "batch_size": whole(1, 1000, good=(1,)),
    "val_fraction": real(0, 1, True, False, good=(0, 0.3)),
    "test_fraction": real(0, 1, True, False, good=(0, 0.3)),
    "text_column": choice("text", null=True, good=("text", "null")),
    "max_val_blocks": whole(1, null=True, good=(1, 10**30, "null")),
    "streaming": flag(good=("true",)),
    "documents": choice("joined", "separate", null=True, good=("joined", "null")),
    "pack": flag(good=("true",)),
    "group_by_length": flag(good=("true",)),
    "split_digits": flag(good=("true",)),
    "val_within_groups": flag(good=("true",)),
    "num_workers": whole(0, null=True, good=(1, "null"), also=(("huge", "5000"), ("huge", str(10**9)))),
    "seed": whole(0, 2**63 - 1, good=(0, 2**31)),
    "cache_dir": place_to_write(good=("{here}/cache", "")),
}
