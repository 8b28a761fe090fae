import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.oracle import dense_attention, visible
from tpo_jax.models import xla_attention
from tpo_jax.models.attention import attention, best_backend, branch_attention
from tpo_jax.parallel.mesh import make_mesh

N, G, H = 4, 2, 8


def _arrays(seed, *shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def _prefix_case():
    """Two rows of a causal prefix: two packed segments and padding; all padding."""
    q, k, v = _arrays(0, (2, 12, N, H), (2, 12, G, H), (2, 12, G, H))
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 12], jnp.int32)
    return q, k, v, segments


def _branch_case():
    """B=2, K=3, R=5 against P=7; branch tokens of two segments, padded."""
    shapes = [(2, 3, 5, N, H), (2, 7, G, H), (2, 7, G, H), (2, 3, 5, G, H), (2, 3, 5, G, H)]
    arrays = _arrays(1, *shapes)
    prefix_segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], jnp.int32)
    segments = jnp.array(
        [[[1, 1, 1, 0, 0], [2, 2, 2, 2, 2], [1, 1, 2, 2, 0]], [[1] * 5, [1, 0, 0, 0, 0], [0] * 5]],
        jnp.int32,
    )
    return arrays, prefix_segments, segments


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_prefix_attention_is_the_rule_in_words(backend):
    q, k, v, segments = _prefix_case()
    out = attention(
        q, k, v, q_segments=segments, kv_segments=segments, causal_offset=0, backend=backend
    )
    for b in range(2):
        expected = dense_attention(q[b], k[b], v[b], visible(segments[b], segments[b], 0))
        np.testing.assert_allclose(out[b], expected, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_branch_attention_is_the_rule_in_words(backend):
    (q, pk, pv, k, v), prefix_segments, segments = _branch_case()
    out = branch_attention(
        q, pk, pv, k, v, q_segments=segments, prefix_segments=prefix_segments,
        own_segments=segments, backend=backend,
    )  # fmt: skip
    for b in range(2):
        for r in range(3):
            mask = visible(segments[b, r], np.r_[prefix_segments[b], segments[b, r]], 7)
            keys, values = np.r_[pk[b], k[b, r]], np.r_[pv[b], v[b, r]]
            expected = dense_attention(q[b, r], keys, values, mask)
            np.testing.assert_allclose(out[b, r], expected, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_a_sliding_window_hides_what_is_far_back(backend):
    q, k, v, segments = _prefix_case()
    run = functools.partial(attention, causal_offset=0, window=3, backend=backend)
    out = jax.jit(run)(q, k, v, q_segments=segments, kv_segments=segments)
    for b in range(2):
        mask = visible(segments[b], segments[b], 0, window=3)
        np.testing.assert_allclose(out[b], dense_attention(q[b], k[b], v[b], mask), atol=2e-5)
    with pytest.raises(ValueError, match="window=3 needs a causal_offset"):
        attention(q, k, v, window=3)


def _windowed_case():
    """Branches behind prefixes of 7 and 4 tokens, the second padded to 7."""
    arrays, _, _ = _branch_case()
    prefix_segments = jnp.array([[1] * 7, [1] * 4 + [0] * 3], jnp.int32)
    segments = jnp.array([[[1] * 5, [1] * 3 + [0] * 2, [1] * 5]] * 2, jnp.int32)
    own = jnp.arange(5) + jnp.array([7, 4])[:, None, None]
    positions = (
        jnp.broadcast_to(own, segments.shape), jnp.tile(jnp.arange(7), (2, 1)),
        jnp.broadcast_to(own, segments.shape),
    )  # fmt: skip
    keywords = {"q_segments": segments, "prefix_segments": prefix_segments,
                "own_segments": segments, "window": 4, "positions": positions}  # fmt: skip
    return arrays, keywords


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_the_window_of_a_branch_does_not_count_padding(backend):
    (q, pk, pv, k, v), keywords = _windowed_case()
    window = keywords.pop("window")
    run = jax.jit(functools.partial(branch_attention, window=window, backend=backend))
    out = run(q, pk, pv, k, v, **keywords)
    segments = keywords["own_segments"]
    for b, length in enumerate((7, 4)):  # the same row without its padding
        for r in range(3):
            real = np.r_[np.ones(length), segments[b, r]]
            mask = visible(segments[b, r], real, length, window=4)
            keys, values = np.r_[pk[b, :length], k[b, r]], np.r_[pv[b, :length], v[b, r]]
            mask[~mask.any(axis=1)] = True  # padding; not compared
            expected = dense_attention(q[b, r], keys, values, mask)
            seen = np.asarray(segments[b, r]) > 0
            np.testing.assert_allclose(out[b, r][seen], expected[seen], atol=2e-5)


def test_without_mask_every_key_counts():
    q, k, v, _ = _prefix_case()
    expected = dense_attention(q[0], k[0], v[0], np.ones((12, 12), bool))
    np.testing.assert_allclose(attention(q, k, v)[0], expected, atol=2e-5)


def test_a_row_that_sees_nothing_is_finite_with_finite_gradient():
    q, k, v, _ = _prefix_case()
    one, other = jnp.ones((2, 12), jnp.int32), jnp.full((2, 12), 2, jnp.int32)

    def total(q):
        return jnp.sum(attention(q, k, v, q_segments=one, kv_segments=other) ** 2)

    assert np.isfinite(total(q))
    np.testing.assert_array_equal(jax.grad(total)(q), 0)


@pytest.mark.parametrize("window", [None, 100])
def test_blocks_are_the_rule_in_words_and_so_is_their_gradient(window):
    """530 tokens are four blocks, the last one shorter. The gradient is compared along one random
    direction, with a difference quotient in float64."""
    arrays = _arrays(5, (1, 530, N, H), (1, 530, G, H), (1, 530, G, H))
    direction = _arrays(6, *(x.shape for x in arrays))
    segments = np.repeat([[1, 2, 0]], (300, 170, 60), axis=1)
    mask = visible(segments[0], segments[0], 0, window)

    def total(arrays):
        out = attention(*arrays, q_segments=segments, kv_segments=segments, causal_offset=0,
                        window=window, backend="xla")  # fmt: skip
        return jnp.sum(jnp.sin(3 * out)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
    np.testing.assert_allclose(
        out[0], dense_attention(*(x[0] for x in arrays), mask), atol=2e-5
    )  # fmt: skip

    def moved(step):
        pairs = zip(arrays, direction, strict=True)
        steps = (np.float64(x[0]) + step * np.float64(d[0]) for x, d in pairs)
        return np.sin(3 * dense_attention(*steps, mask)).sum()

    want = (moved(1e-4) - moved(-1e-4)) / 2e-4
    got = sum(np.vdot(np.float64(g), d) for g, d in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_equal_one_product_in_value_and_gradient(window, dtype):
    """300 tokens are two blocks; two packed segments and padding."""
    q, k, v = _arrays(3, (2, 300, N, H), (2, 300, G, H), (2, 300, G, H))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    segments = jnp.array([[1] * 140 + [2] * 120 + [0] * 40, [1] * 300], jnp.int32)

    @functools.partial(jax.jit, static_argnums=3)
    def values_and_gradient(q, k, v, backend):
        def total(q, k, v):
            out = attention(
                q, k, v, q_segments=segments, kv_segments=segments, causal_offset=0,
                window=window, backend=backend,
            )  # fmt: skip
            return jnp.sum(jnp.sin(3 * out.astype(jnp.float32))), out

        gradient, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradient

    exact = values_and_gradient(*(x.astype(jnp.float32) for x in (q, k, v)), "dense")
    dense, blocks = (values_and_gradient(q, k, v, backend) for backend in ("dense", "xla"))
    for want, plain, got in zip(exact, dense, blocks, strict=True):
        got, plain = (np.asarray(x, np.float32) for x in (got, plain))
        bound = 2 * np.abs(plain - want).max()
        if dtype == jnp.float32:
            bound = 1e-6 * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=bound)


@pytest.mark.parametrize(("window", "causal_offset"), [(None, 0), (100, 7)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turns_equal_blocks_in_value_and_gradient(window, causal_offset, dtype, monkeypatch):
    """530 tokens are four blocks of 133 and fewer, each of three turns of 48, the last filled up;
    two packed segments and padding."""
    arrays = _arrays(7, (2, 530, N, H), (2, 530, G, H), (2, 530, G, H))
    arrays = [x.astype(dtype) for x in arrays]
    segments = np.repeat([[1, 2, 0], [1, 1, 1]], (300, 170, 60), axis=1)

    def found(arrays):
        def total(arrays):
            out = attention(*arrays, q_segments=segments, kv_segments=segments, window=window,
                            causal_offset=causal_offset, backend="xla")  # fmt: skip
            return jnp.sum(jnp.sin(3 * out.astype(jnp.float32))), out

        gradient, out = jax.jit(jax.grad(total, has_aux=True))(arrays)
        return [np.asarray(x, np.float32) for x in (out, *gradient)]

    exact, blocks = found([x.astype(jnp.float32) for x in arrays]), found(arrays)
    monkeypatch.setattr(xla_attention, "LONG", 529)
    monkeypatch.setattr(xla_attention, "TURN", 48)
    turns = found(arrays)
    np.testing.assert_allclose(turns[0], blocks[0], atol=1e-6 if dtype == jnp.float32 else 2e-2)
    for want, usual, got in zip(exact, blocks, turns, strict=True):
        bound = 1e-6 * np.abs(want).max()
        if dtype == jnp.bfloat16:  # added up in float32, so more of them are no more wrong
            bound = 2 * np.abs(usual - want).max()
        np.testing.assert_allclose(got, want, atol=bound)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_long_row_holds_the_logits_of_one_turn(dtype):
    """Compiled, not run: 16,384 tokens with one head, whose logits are 1 GiB at once."""
    T = 16384
    array = jax.ShapeDtypeStruct((1, T, 1, 8), dtype)

    def total(arrays, segments):
        out = attention(*arrays, q_segments=segments, kv_segments=segments, causal_offset=0)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
    compiled = jax.jit(jax.grad(total)).lower([array] * 3, segments).compile()
    # The backward pass wants several arrays of 16 MiB, and blocks of a fourth of the row 1.5 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * T / 8


def _long_branch_case(window):
    """Two rows of 3 branches of 70 tokens, 210 queries, behind prefixes of 300; packed segments,
    padding inside a prefix and behind a branch, own tokens that a query sees only up to itself."""
    shapes = [(2, 3, 70, N, H), (2, 300, G, H), (2, 300, G, H), (2, 3, 70, G, H), (2, 3, 70, G, H)]
    prefix = np.array([np.repeat([1, 0, 1, 2], (90, 30, 60, 120)), [1] * 300], np.int32)
    own = np.ones((2, 3, 70), np.int32)
    own[0, 1], own[1, 0, 50:] = 2, 0
    keywords = {"q_segments": own, "prefix_segments": prefix, "own_segments": own, "window": window}
    if window is not None:
        places = np.stack([np.cumsum(prefix == s, axis=1) - 1 for s in (0, 1, 2)])
        lengths = places[..., -1] + 1
        own_places = np.take_along_axis(lengths.T, own[:, :, 0], axis=1)[..., None] + np.arange(70)
        of_prefix = np.take_along_axis(places, prefix[None], axis=0)[0]
        keywords["positions"] = own_places, of_prefix, own_places
    return _arrays(8, *shapes), keywords


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_branches_in_turns_are_branches_at_once_in_value_and_gradient(window, dtype, monkeypatch):
    """210 queries against the prefix are five turns of 48, the last filled up; a branch's own 70
    against themselves are two."""
    arrays, keywords = _long_branch_case(window)
    arrays = [x.astype(dtype) for x in arrays]

    def found(arrays, backend="xla"):
        def total(arrays):
            out = branch_attention(*arrays, **keywords, backend=backend)
            return jnp.sum(jnp.sin(3 * out.astype(jnp.float32))), out

        gradient, out = jax.jit(jax.grad(total, has_aux=True))(arrays)
        return [np.asarray(x, np.float32) for x in (out, *gradient)]

    exact, once = found([x.astype(jnp.float32) for x in arrays], "dense"), found(arrays)
    looped = _counted(monkeypatch)
    monkeypatch.setattr(xla_attention, "LONG", 60)
    monkeypatch.setattr(xla_attention, "TURN", 48)
    turns = found(arrays)
    assert looped == [(210, 300), (70, 70)]
    for want, usual, got in zip(exact, once, turns, strict=True):
        bound = 1e-6 * np.abs(want).max()
        if dtype == jnp.bfloat16:
            bound = 2 * np.abs(usual - want).max()
        np.testing.assert_allclose(got, want, atol=bound)


def _counted(monkeypatch):
    """A list to which every call of `in_turns` adds its number of queries and of keys."""
    calls, real = [], xla_attention.in_turns

    def in_turns(q, k, *rest):
        calls.append((q.shape[1], k.shape[1]))
        return real(q, k, *rest)

    monkeypatch.setattr(xla_attention, "in_turns", in_turns)
    return calls


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_branches_behind_a_long_prefix_hold_the_logits_of_one_turn(dtype):
    """Compiled, not run: 4 branches of 512 tokens with one head behind 16,384, whose logits are
    128 MiB at once and 16 MiB a turn."""
    P, K, R = 16384, 4, 512
    shapes = (1, K, R, 1, 8), *((1, P, 1, 8),) * 2, *((1, K, R, 1, 8),) * 2
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    segments = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, K, R), (1, P))]

    def total(arrays, own, prefix):
        out = branch_attention(*arrays, q_segments=own, prefix_segments=prefix, own_segments=own)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    compiled = jax.jit(jax.grad(total)).lower(arrays, *segments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * K * R * P


@pytest.mark.parametrize("causal_offset", [None, 0, 5, -3])
def test_gradient_of_other_shapes_equals_one_product(causal_offset):
    """Queries of other lengths than keys; offset -3 leaves three queries that see nothing."""
    q, k, v = _arrays(4, (2, 260, N, H), (2, 270, G, H), (2, 270, G, H))

    def total(arrays, backend):
        out = attention(*arrays, causal_offset=causal_offset, backend=backend)
        return jnp.sum(jnp.sin(out[:, 3:]))

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    got, want = (gradient((q, k, v), backend) for backend in ("xla", "dense"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "of"),
    [
        ("splash", ("tpu", "float32", 72)),
        ("cudnn", ("gpu", "bfloat16", 128)),
        ("cudnn", ("gpu", "bfloat16", 72)),
        ("xla", ("gpu", "float32", 128)),
        ("xla", ("gpu", "bfloat16", 256)),
        ("xla", ("gpu", "bfloat16", 36)),
        ("xla", ("gpu", "bfloat16", 128, 2)),
        ("splash", ("tpu", "bfloat16", 128, 2)),
        ("xla", ("cpu", "bfloat16", 128)),
    ],
)
def test_auto_takes_what_the_devices_can(backend, of):
    assert best_backend(*of) == backend


def test_the_rule_is_part_of_the_call():
    q, k, v, segments = _prefix_case()
    with pytest.raises(ValueError, match="backend 'flash' is unknown; use one of"):
        attention(q, k, v, backend="flash")
    with pytest.raises(ValueError, match="must be given together"):
        attention(q, k, v, q_segments=segments)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
def test_splash_on_a_mesh_equals_one_device(sizes):
    """tensor=2 splits the two key/value heads, tensor=4 cannot and repeats the work."""
    q, k, v = _arrays(2, (4, 12, N, H), (4, 12, G, H), (4, 12, G, H))
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3] * 4, jnp.int32)

    def run(q, k, v, segments, backend):
        return attention(
            q, k, v, q_segments=segments, kv_segments=segments, causal_offset=0, backend=backend
        )

    want = run(q, k, v, segments, "xla")
    with jax.set_mesh(make_mesh(sizes)):
        got = jax.jit(run, static_argnums=4)(q, k, v, segments, "splash_interpret")
    np.testing.assert_allclose(got, want, atol=2e-5)
