"""The backend "cudnn": what it asks of the kernel, and on a GPU what comes back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpo_jax.models.attention import attention, branch_attention

N, G, H = 4, 2, 64
SEGMENTS = np.repeat([[1, 2, 0]], (30, 17, 16), axis=1)  # 63 tokens: an odd length


def arrays(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]


def rows(T=63, S=63):
    return arrays((2, T, N, H), (2, S, G, H), (2, S, G, H))


def with_segments(length):
    segments = np.tile(SEGMENTS[:, :length], (2, 1))
    return {"q_segments": segments, "kv_segments": segments}


# Of `attention`: arrays and how they see each other.
CASES = {
    "plain": (rows(), {"causal_offset": 0}),
    "everything": (rows(62, 50), {}),
    "window": (rows(), {"causal_offset": 0, "window": 9}),
    "segments": (rows(), {"causal_offset": 0} | with_segments(63)),
    "segments and window": (rows(), {"causal_offset": 0, "window": 9} | with_segments(63)),
    "behind a prefix": (rows(20, 63), {"causal_offset": 43}),
}


def branches(backend):
    """Three branches of 11 tokens behind prefixes of 63."""
    q, own_k, own_v = arrays((2, 3, 11, N, H), (2, 3, 11, G, H), (2, 3, 11, G, H))
    _, prefix_k, prefix_v = rows()
    segments = np.tile([1] * 8 + [0] * 3, (2, 3, 1))
    run = functools.partial(
        branch_attention, q_segments=segments, prefix_segments=np.tile(SEGMENTS, (2, 1)),
        own_segments=segments, backend=backend,
    )  # fmt: skip
    return run, (q, prefix_k, prefix_v, own_k, own_v)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_asked_for_the_rule(name, monkeypatch):
    """What it is given means the same to JAX's own attention, with a mask only where it is needed
    and then of even lengths."""
    asked, real = [], jax.nn.dot_product_attention

    def instead(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        asked.append((q.shape[1], k.shape[1], options))
        return real(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    inputs, rule = CASES[name]
    inputs = [x.astype(jnp.float32) for x in inputs]
    got = attention(*inputs, **rule, backend="cudnn")
    np.testing.assert_allclose(got, attention(*inputs, **rule, backend="dense"), atol=1e-5)
    ((T, S, options),) = asked
    if name in ("plain", "everything", "window"):
        assert options.get("mask") is None and options["is_causal"] == (name != "everything")
    else:
        assert options["mask"].shape[2:] == (T, S) and T % 2 == S % 2 == 0


@pytest.mark.parametrize(
    "T, rule, kernel",
    [
        (2456, "segments", "cudnn"),  # 5 bytes a query are 12,280, and 12 * 256 * 4 heads 12,288
        (2458, "segments", "xla"),
        (2458, "plain", "cudnn"),
        (2458, "behind a prefix", "xla"),
    ],
)
def test_long_rows_do_not_get_a_mask(T, rule, kernel, monkeypatch):
    """Traced, not run."""
    asked = []

    def instead(q, k, v, **options):
        asked.append(options)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    options = {"causal_offset": 1 if rule == "behind a prefix" else 0}
    if rule == "segments":
        options["q_segments"] = options["kv_segments"] = np.ones((1, T), np.int32)
    q, k = (jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16) for heads in (N, G))
    run = functools.partial(attention, **options, backend="cudnn")
    assert jax.eval_shape(run, q, k, k).shape == q.shape
    assert len(asked) == (kernel == "cudnn")


def value_and_gradient(run, inputs):
    def total(*inputs):
        out = run(*inputs).astype(jnp.float32)
        return jnp.sum(jnp.sin(3 * out)), out

    gradient, out = jax.jit(jax.grad(total, tuple(range(len(inputs))), has_aux=True))(*inputs)
    return [np.asarray(x, np.float32) for x in (out, *gradient)]


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs an NVIDIA GPU, and TPO_TEST_PLATFORM=cuda"
)
@pytest.mark.parametrize("name", [*CASES, "branches"])
def test_bfloat16_is_at_most_twice_as_wrong_as_xla(name):
    """In value and gradient, against float32 without blocks. Padding is compared, too."""

    def found(backend, dtype=jnp.bfloat16):
        if name == "branches":
            run, inputs = branches(backend)
        else:
            inputs, rule = CASES[name]
            run = functools.partial(attention, **rule, backend=backend)
        return value_and_gradient(run, [x.astype(dtype) for x in inputs])

    exact, xla, cudnn = found("dense", jnp.float32), found("xla"), found("cudnn")
    for want, usual, got in zip(exact, xla, cudnn, strict=True):
        assert np.abs(got - want).max() <= 2 * np.abs(usual - want).max()
