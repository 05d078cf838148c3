"""What every layer of a model is worth: reports, sweeps of settings, tasks and their scores."""
