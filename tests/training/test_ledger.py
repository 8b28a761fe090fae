import json

import pytest

from tpo_jax.training.ledger import CATEGORIES, Ledger


class Clock:
    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_every_second_has_one_category_and_inner_pauses_outer():
    clock = Clock(1000.0)
    ledger = Ledger(clock)
    with ledger.measure("init"):
        clock.now += 3
        with ledger.measure("compile"):
            clock.now += 5
        clock.now += 1
    clock.now += 2  # no measure is open
    with ledger.measure("step"):
        clock.now += 9
        assert ledger.seconds()["step"] == 9  # an open measure counts up to now
    seconds = ledger.seconds()
    assert seconds == dict.fromkeys(CATEGORIES, 0.0) | {
        "init": 4, "compile": 5, "other": 2, "step": 9,
    }  # fmt: skip
    assert sum(seconds.values()) == clock.now - 1000
    assert ledger.goodput() == pytest.approx(9 / 20)


def test_an_exception_closes_the_measure():
    clock = Clock(0.0)
    ledger = Ledger(clock)
    with pytest.raises(RuntimeError), ledger.measure("step"):
        clock.now += 1
        raise RuntimeError
    clock.now += 4
    assert ledger.seconds()["step"] == 1 and ledger.seconds()["other"] == 4


def test_history_adds_up_over_restarts_and_the_gap_is_lost_time():
    clock = Clock(0.0)
    first = Ledger(clock)
    with first.measure("step"):
        clock.now += 10
    saved = json.loads(json.dumps(first.state()))  # what a checkpoint holds
    clock.now += 7  # trained on after the save, was killed, waited in the queue
    second = Ledger(clock)
    with second.measure("init"):
        clock.now += 2
    second.resume(saved)
    with second.measure("step"):
        clock.now += 1
    assert second.restarts == 1
    seconds = second.seconds()
    assert (seconds["step"], seconds["restart"], seconds["init"]) == (11, 7, 2)
    assert sum(seconds.values()) == clock.now  # from the first start to now, nothing twice

    third = Ledger(clock)
    third.resume(second.state())
    assert third.restarts == 2 and third.seconds()["step"] == 11
    assert "goodput" in third.summary() and "restarts 2" in third.summary()


def test_saves_and_model_flops_add_up_over_restarts():
    clock = Clock(0.0)
    first = Ledger(clock)
    with first.measure("step"):
        clock.now += 10
    for seconds in (1, 3):
        with first.measure_save():
            clock.now += seconds
    first.count_step(50.0)
    second = Ledger(clock)
    second.resume(json.loads(json.dumps(first.state())))
    with second.measure_save():
        clock.now += 2
    with second.measure("step"):
        clock.now += 10
    second.count_step(150.0)
    assert second.saves == {"count": 3, "blocked": 6, "longest": 3}
    with second.measure("step"), second.measure_save(again=True):
        clock.now += 2  # a part of the save before it
    assert second.saves == {"count": 3, "blocked": 8, "longest": 4}
    assert second.seconds()["checkpoint"] == 8
    assert second.model_flops == 200
    assert second.mfu(peak=40.0) == pytest.approx(200 / 20 / 40)
    assert second.mfu(peak=None) is None


def test_time_that_is_rolled_back_is_lost():
    clock = Clock(0.0)
    ledger = Ledger(clock)
    with ledger.measure("step"):
        clock.now += 10
    ledger.count_step(1.0)
    saved = ledger.state()
    with ledger.measure("step"):
        clock.now += 4
    with ledger.measure("evaluation"):
        clock.now += 2
    ledger.count_step(1.0)
    ledger.roll_back(saved)
    seconds = ledger.seconds()
    assert (seconds["step"], seconds["evaluation"], seconds["restart"]) == (10, 0, 6)
    assert sum(seconds.values()) == clock.now and ledger.model_flops == 1
    assert saved["seconds"]["restart"] == 0 and ledger.restarts == 0


def test_unknown_category_is_refused():
    with pytest.raises(ValueError, match="data_wait"), Ledger().measure("data"):
        pass
