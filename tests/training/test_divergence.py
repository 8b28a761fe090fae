import json
import math

from tpo_jax.training.divergence import ENOUGH, Guard, rolled_back, write_report


def judged(guard, losses, bucket="video"):
    return [guard.judge(step, bucket, loss, math.isfinite(loss))
            for step, loss in enumerate(losses, start=1)]  # fmt: skip


def test_a_leap_and_what_is_not_finite_fail_and_do_not_count():
    guard = Guard(3.0)
    usual = [1.0, 1.2] * ENOUGH
    assert not any(judged(guard, usual))
    found = guard.judge(40, "video", 3.5, True)
    assert found.step == 40 and "3.2 times the median 1.1" in found.reason
    assert guard.judge(41, "video", 3.2, True) is None
    assert guard.judge(42, "video", math.nan, False).reason == "loss or gradient is not finite"
    assert guard.judge(43, "video", 1.0, False)  # the gradient alone
    assert 3.5 not in guard.state()["video"]


def test_the_first_losses_and_other_buckets_are_not_compared():
    guard = Guard(3.0)
    assert not any(judged(guard, [1.0] * (ENOUGH - 1) + [9.0]))
    assert not any(judged(guard, [100.0], bucket="image"))
    assert not any(judged(Guard(0.0), [1.0] * ENOUGH + [1e9]))


def test_a_guard_goes_on_from_its_state():
    guard = Guard(3.0)
    judged(guard, [1.0] * ENOUGH)
    again = Guard(3.0, json.loads(json.dumps(guard.state())))
    assert again.judge(20, "video", 4.0, True) and not Guard(3.0).judge(20, "video", 4.0, True)


def test_the_report_has_the_worst_gradients_first(tmp_path):
    found = Guard(0.0).judge(7, "video", math.nan, False)
    rows = [{"video": "v", "examples": ["v/a", "v/b"]}]
    norms = {"a": 1.0, "b": 5.0, "c": math.nan, "d": 2.0}
    file = write_report(tmp_path, found, "video", rows, norms)
    read = json.loads(file.read_text())
    assert file.name == "step_7.json" and read["rows"] == rows and read["loss"] == "nan"
    assert list(read["grad_norms"].items()) == [("c", "nan"), ("b", 5.0), ("d", 2.0), ("a", 1.0)]


def test_skips_add_up_and_the_best_model_stays():
    restored = {"evaluated": 4, "best": {"step": 4}, "skipped": [], "rollbacks": 0}
    current = {"evaluated": 8, "best": {"step": 8}, "skipped": ["x"], "rollbacks": 1}
    rows = [{"video": "v", "examples": ["b", "a"]}, {"video": "v", "examples": ["a"]}]
    assert rolled_back(restored, current, rows) == {
        "evaluated": 4, "best": {"step": 8}, "skipped": ["a", "b", "x"], "rollbacks": 2,
    }  # fmt: skip
