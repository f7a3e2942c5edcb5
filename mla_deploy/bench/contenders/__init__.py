"""What can be timed: one file per way to run a model, each behind the same few calls."""
