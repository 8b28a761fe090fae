"""A config file with a sweep, on the micro model: --config=tests/experiments/swept.py:DATA."""

import tiny_run


def get_config(arg: str | None = None):
    config = tiny_run.get_config(f"data={arg or 'data'},buckets=1,steps=4")
    config.eval_every = 0
    config.dropout = 0.0
    config.checkpoint.every = config.get_ref("steps") // 2
    config.log_every = 1
    return config


def sweep(add):
    for rate in (1e-3, 3e-3):
        for seed in range(2):
            add(seed=seed, **{"trainable[0][1]": rate})
