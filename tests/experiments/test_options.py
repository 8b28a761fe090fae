"""Options by path: reading, setting, references, errors by name."""

import pytest
from ml_collections import ConfigDict

from experiments.sweeps import options
from tpo_jax.training.config import ConfigError, default_config, to_dict


@pytest.fixture
def config():
    config = default_config()
    config.trainable = [["heads/", 1e-3], [".*", 1e-4]]
    config.data.train = [{"path": "a", "tasks": {"region": 1.0}}]
    return config


@pytest.mark.parametrize(
    "path", ["seed", "optimizer.clip", "trainable[0][1]", "data.train[0].weight", "losses.a/b"]
)
def test_join_is_the_inverse_of_parse(path):
    assert options.join(options.parse(path)) == path


@pytest.mark.parametrize("path", ["", "a..b", "[0]", "a[x]", "a.", "a[0"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ConfigError, match="expected a path"):
        options.parse(path)


def test_values_inside_lists_are_set_and_integers_become_floats(config):
    options.put(config, "trainable[1][1]", 1)
    options.put(config, "data.train[0].tasks.region", 3)
    options.put(config, "optimizer.clip", 2)
    plain = to_dict(config)
    assert plain["trainable"] == [["heads/", 1e-3], [".*", 1.0]]
    assert plain["data"]["train"][0]["tasks"] == {"region": 3.0}
    assert plain["optimizer"]["clip"] == 2.0 and isinstance(plain["optimizer"]["clip"], float)


def test_a_list_that_configs_share_is_not_changed_for_the_others(config):
    shared = [[".*", 1e-3]]
    config.trainable, other = shared, ConfigDict({"trainable": shared})
    options.put(config, "trainable[0][1]", 5e-3)
    assert shared[0][1] == other.trainable[0][1] == 1e-3


def test_what_was_computed_from_an_option_follows_it(config):
    config.checkpoint.every = config.get_ref("steps") // 10
    options.put(config, "steps", 500)
    assert to_dict(config)["checkpoint"]["every"] == 50


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.clib", 1.0, "optimizer has no option 'clib'; it has b2, clip"),
        ("trainable[2][1]", 1.0, "trainable has no entry 2"),
        ("steps", 1.5, "steps = 1.5: is a float, the config has 1000; give a int"),
        ("steps", True, "steps = True: is a bool"),
        ("seed.a", 1, "seed has no option 'a'; it has 0"),
    ],
)
def test_a_wrong_option_is_an_error_by_name(config, path, value, message):
    with pytest.raises(ConfigError) as error:
        options.put(config, path, value)
    assert message in str(error.value)


def test_leaves_name_every_value_by_a_path_that_reads_it(config):
    plain = to_dict(config)
    found = dict(options.leaves(plain))
    assert found["trainable[0][1]"] == 1e-3 and found["buckets"] == {}
    assert all(options.get(plain, path) == value for path, value in found.items())
