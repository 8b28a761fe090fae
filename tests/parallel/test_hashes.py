import jax
import numpy as np

from tpo_jax.parallel.hashes import hash_weights


def test_weight_hash_sees_value_dtype_path_but_not_sharding():
    weights = {"a": {"kernel": np.arange(16, dtype=np.float32).reshape(8, 2)}, "b": np.ones(3)}
    reference = hash_weights(weights)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = {"a": {"kernel": jax.device_put(weights["a"]["kernel"], sharding)}, "b": np.ones(3)}
    assert hash_weights(sharded) == reference
    moved = weights["a"]["kernel"].copy()
    moved[3, 1] = np.nextafter(moved[3, 1], 9)
    assert hash_weights({"a": {"kernel": moved}, "b": np.ones(3)}) != reference
    assert hash_weights({"c": weights["a"], "b": np.ones(3)}) != reference
    assert hash_weights({**weights, "b": np.ones(3, np.float32)}) != reference
