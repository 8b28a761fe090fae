"""The compile cache in a bucket: JAX's own, through etils.epath."""

import jax
import jax.numpy as jnp
import memory_bucket
import pytest
from etils import epath
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from tpo_jax.training.compiled import keep_programs

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def own_cache(monkeypatch):
    """The cache of the other tests comes back afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    memory_bucket.install(monkeypatch)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_restart_reads_its_programs_from_a_bucket(own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a gs:// path that is taken for a local one would end
    keep_programs("gs://bucket/cache")
    events = []

    def compile_anew():
        jax.clear_caches()
        jax.jit(lambda x: jnp.sin(x) * 1.25).lower(jnp.zeros(8)).compile()
        names = {path.name for path in epath.Path("gs://bucket/cache").iterdir()}
        found = [event for event in events if event.endswith(("/cache_hits", "/cache_misses"))]
        events.clear()
        return names, found

    def listen(event, **_):
        events.append(event)

    monitoring.register_event_listener(listen)
    try:
        first, missed = compile_anew()
        second, hit = compile_anew()
    finally:
        monitoring.unregister_event_listener(listen)
    assert first and second == first and not list(tmp_path.iterdir())
    assert set(missed) == {"/jax/compilation_cache/cache_misses"}
    assert set(hit) == {"/jax/compilation_cache/cache_hits"}
