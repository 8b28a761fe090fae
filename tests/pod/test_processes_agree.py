"""Two processes that would not run the same program stop before the first collective."""

import processes

# Agrees, then disagrees, then is alone: process 1 leaves out the last call.
PROGRAM = """
import sys
import jax
from tpo_jax.training import agreement

port, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"localhost:{port}", 2, index)
assert jax.process_count() == 2  # starts the back end, which needs the real store
keys = iter("abc")
real = agreement.distributed.global_state.client

class Fresh:  # the store keeps what it was told; every call here is a start of its own
    def __init__(self, prefix):
        self.prefix = prefix
    def key_value_set(self, key, value):
        real.key_value_set(self.prefix + key, value)
    def blocking_key_value_get(self, key, timeout):
        return real.blocking_key_value_get(self.prefix + key, timeout)

def check(mine, timeout):
    agreement.distributed.global_state.client = Fresh(next(keys))
    try:
        agreement.check(mine, timeout)
        print("agreed", flush=True)
    except agreement.Disagreement as error:
        print(error, flush=True)
    finally:
        agreement.distributed.global_state.client = real

check({"code": "1"}, 60.0)
check({"code": "1", "config.seed": str(7 + index)}, 60.0)
if index == 0:
    check({"code": "1"}, 0.2)
"""


def test_two_processes_agree_disagree_and_miss_each_other():
    said = processes.run_two(PROGRAM)
    for out in said:
        assert out.startswith("agreed\nthe 2 processes would not run the same program:\n")
        assert "process 1: config.seed is 8, the others have 7\n" in out
    assert "process 1 of 2 did not report within 0.2 s of process 0" in said[0]
