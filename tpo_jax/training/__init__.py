"""How it runs: train state, optimizer, train step, checkpoints, ledger and writers."""
