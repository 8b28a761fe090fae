"""Windows of the profiler, by config and by signal, also in a bucket; memory of devices."""

import os
import signal

import jax
import jax.numpy as jnp
import memory_bucket
import pytest
from etils import epath

from tpo_jax.training import profiling
from tpo_jax.training.profiling import Profiler, device_memory


@pytest.fixture
def windows(monkeypatch):
    """Start and end of every trace, by the step that was about to run; one real file each."""
    seen, now = [], [0]

    def start(folder):
        seen.append(["start", now[0]])
        path = epath.Path(folder) / "plugins/profile/1/host.xplane.pb"
        path.parent.mkdir(parents=True)
        path.write_text(f"trace {len(seen)}")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(["stop", now[0]]))

    def run(profiler, steps, at=None):
        for step in range(1, steps + 1):
            now[0] = step
            if step == at:
                os.kill(os.getpid(), signal.SIGUSR1)
            profiler.before_step(step, jnp.zeros(()))
        now[0] = steps + 1
        profiler.close(jnp.zeros(()))
        return seen

    return run


def test_the_config_opens_one_window_of_whole_steps(tmp_path, windows):
    profiler = Profiler(tmp_path, {"start": 3, "steps": 2})
    assert windows(profiler, 10) == [["start", 3], ["stop", 5]]
    assert (tmp_path / "profile/plugins/profile/1/host.xplane.pb").read_text() == "trace 1"


def test_a_signal_opens_another_and_the_end_of_the_run_closes_it(tmp_path, windows):
    before = signal.getsignal(signal.SIGUSR1)
    seen = windows(Profiler(tmp_path, {"start": 0, "steps": 0}), 8, at=6)
    assert seen == [["start", 6], ["stop", 9]]  # five steps were asked for, three were left
    assert signal.getsignal(signal.SIGUSR1) is before


def test_without_config_or_signal_nothing_is_traced(tmp_path, windows):
    assert windows(Profiler(tmp_path, {"start": 0, "steps": 0}), 8) == []
    assert not (tmp_path / "profile").exists()


def test_the_trace_of_a_run_in_a_bucket_goes_there(windows, monkeypatch):
    memory_bucket.install(monkeypatch)
    windows(Profiler("gs://bucket/run", {"start": 1, "steps": 1}), 2)
    target = epath.Path("gs://bucket/run/profile/plugins/profile/1/host.xplane.pb")
    assert target.read_text() == "trace 1"


def test_a_real_trace_holds_the_step(tmp_path):
    profiler = Profiler(tmp_path, {"start": 1, "steps": 1})
    profiler.before_step(1, None)
    result = jax.jit(lambda x: jnp.sin(x) @ x, inline=False)(jnp.ones((8, 8)))
    profiler.close(result)
    (file,) = (tmp_path / "profile").rglob("*.xplane.pb")
    names = {
        event.name
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    }
    assert any("dot" in name or "PjitFunction" in name for name in names)


class FakeDevice:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [FakeDevice({"bytes_in_use": 5, "peak_bytes_in_use": 9}),
               FakeDevice({"bytes_in_use": 7, "peak_bytes_in_use": 8})]  # fmt: skip
    monkeypatch.setattr(profiling.jax, "local_devices", lambda: devices)
    assert device_memory() == {"memory/bytes_in_use": 7.0, "memory/peak_bytes": 9.0}
    devices.append(FakeDevice(None))  # a backend that does not say
    assert device_memory() == {}
