"""Evaluation: reports by layer, tasks and their scores, sweeps of decoding settings, comparison of runs."""
