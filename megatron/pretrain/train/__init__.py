"""The training loop: load, step, log, evaluate, save."""
