import pytest

from tpo_jax.training.config import ConfigError, default_config, validate
from tpo_jax.training.save_policy import Due, Save, SavePolicy

NOTHING = {"fresh": True, "loss": None, "last": False, "told": False, "poll": True}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_kind_at_its_time():
    clock = Clock()
    due = Due(SavePolicy(every=10, keep=1, permanent=20, minutes=2.0, best=2), clock=clock)
    assert due.at(5, **NOTHING) == Save(())
    assert due.at(10, **NOTHING).kinds == ("step",)
    assert due.at(20, **NOTHING).kinds == ("step", "permanent")
    assert due.at(20, **NOTHING | {"fresh": False}).kinds == ()  # it was restored from there
    assert due.at(23, **NOTHING | {"last": True}).kinds == ("step",)
    assert due.at(24, **NOTHING | {"told": True}).kinds == ("preemption",)


def test_the_clock_counts_from_the_last_save_of_any_kind():
    clock = Clock()
    due = Due(SavePolicy(every=10, keep=1, minutes=2.0), clock=clock)
    clock.now = 119
    assert due.at(1, **NOTHING).kinds == ()
    assert due.at(10, **NOTHING).kinds == ("step",)
    clock.now = 230
    assert due.at(11, **NOTHING).kinds == ()
    clock.now = 240
    assert due.at(12, **NOTHING | {"poll": False}).kinds == ()
    assert due.at(13, **NOTHING).kinds == ("time",)
    assert due.at(14, **NOTHING).kinds == ()


def test_best_are_those_of_the_lowest_losses_also_after_a_restart():
    policy = SavePolicy(every=100, keep=1, best=2)
    due = Due(policy)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        assert due.at(step, **NOTHING | {"loss": loss}).kinds == ("best",)
    again = Due(policy, due.losses)
    assert again.at(7, **NOTHING | {"loss": 2.5}).kinds == ()
    assert again.at(8, **NOTHING | {"loss": 0.5}) == Save(("best",), 0.5)
    saves = {1: Save(("best",), 3.0), 2: Save(("best",), 1.0), 8: Save(("best",), 0.5),
             9: Save(("time",))}  # fmt: skip
    assert policy.retained(saves) == {2, 8, 9}


def test_temporary_ones_go_with_the_next_and_permanent_ones_stay():
    policy = SavePolicy(every=10, keep=2, permanent=20)
    saves = {20: Save(("step", "permanent")), 25: Save(("time",)), 30: Save(("step",)),
             40: Save(("step",)), 50: Save(("step",)), 51: Save(("preemption",))}  # fmt: skip
    assert policy.retained(saves) == {20, 40, 50, 51}
    assert policy.retained({25: Save(("time",))}) == {25}
    assert policy.retained({}) == set()


def test_at_least_one_must_be_kept():
    with pytest.raises(ValueError, match="checkpoint.keep=0"):
        SavePolicy(every=1, keep=0)


def test_local_saves_come_beside_the_others_and_do_not_put_them_off():
    clock = Clock()
    policy = SavePolicy(every=10, keep=1, minutes=2.0, local_dir="/fast", local_every=4)
    due = Due(policy, clock=clock)
    assert due.at(4, **NOTHING).kinds == ("local",)
    clock.now = 120
    assert due.at(8, **NOTHING).kinds == ("time", "local")  # counted from the start
    assert due.at(10, **NOTHING).kinds == ("step",)
    assert due.at(20, **NOTHING).kinds == ("step", "local")
    assert due.at(20, **NOTHING | {"fresh": False}).kinds == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_dir": "/fast"}, "local_every=0: one without the other"),
        ({"local_every": 4}, "local_dir=''(.|\n)*one without the other"),
        ({"local_dir": "gs://bucket", "local_every": 4}, "not on the host"),
    ],
)
def test_half_a_local_tier_and_one_that_is_not_local_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SavePolicy(every=1, keep=1, **options)
    config = default_config()
    config.checkpoint.update(options)
    with pytest.raises(ConfigError, match=message):
        validate(config)
