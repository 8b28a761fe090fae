"""The CG-DETR head on clip and text features is the published function, block by block and whole.

Against float64 NumPy (cg_detr_published.py) that reads the published tensors by their names
and knows no padding; the head gets a batch with unequal lengths.
"""

import dataclasses
import functools

import cg_detr_published as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_batches import micro
from flax import nnx

from tpo_jax.interop.families.cg_detr_rows import cg_detr_rows
from tpo_jax.interop.mapping import export_leaves, import_leaves
from tpo_jax.models.config import ClipFeaturesConfig, TextFeaturesConfig
from tpo_jax.models.heads import HeadInputs, cg_detr
from tpo_jax.models.layers import LayerNorm, Rngs
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten, unflatten

B, S, F, R = 2, 2, 7, 5
CLIPS = np.array([7, 4])  # of each row
WORDS = np.array([[5, 2], [1, 3]])  # of each slot
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def config():
    base = micro(("cg_detr",))
    return dataclasses.replace(
        base, clip_features=ClipFeaturesConfig(24, 1.0, "by hand"),
        text_features=TextFeaturesConfig(base.language.width, R, "by hand"),
    )  # fmt: skip


@functools.cache
def drawn():
    """(head, its leaves by path, the published tensors as float64), nothing of it the identity."""
    head = nnx.eval_shape(lambda: cg_detr.CgDetrHead(config(), rngs=Rngs(0)))
    structure, state = nnx.split(head)
    rng, leaves = np.random.default_rng(0), {}
    for path, leaf in flatten(nnx.to_pure_dict(state)).items():
        scale = leaf.shape[0] ** -0.5 if path.endswith("/kernel") else 0.3
        start = float(path.endswith("norm1/scale") or path.endswith("norm2/scale"))
        leaves[path] = (start + scale * rng.normal(size=leaf.shape)).astype(np.float32)
    tensors = export_leaves(cg_detr_rows(config().head.layers, "", ""), leaves)
    params = jax.tree.map(nnx.Param, unflatten(leaves))
    double = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    return nnx.merge(structure, nnx.State(params)), leaves, double


@functools.cache
def inputs():
    rng, width = np.random.default_rng(1), config().language.width

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    words = normal(B, S, R, width)
    words[1] *= 1e-3  # so that the epsilon of a norm counts
    return HeadInputs(
        normal(B, S, width), None, None, np.arange(F) < CLIPS[:, None], None,
        prompt=words, prompt_valid=np.arange(R) < WORDS[..., None],
        clip_features=normal(B, F, 24),
    )  # fmt: skip


def each():
    """(b, s, words, prompt, clips) of every slot without padding, float64."""
    given = inputs()
    for b in range(B):
        for s in range(S):
            words = np.asarray(given.prompt[b, s, : WORDS[b, s]], np.float64)
            features = np.asarray(given.clip_features[b, : CLIPS[b]], np.float64)
            yield b, s, words, np.asarray(given.slot_states[b, s], np.float64), features


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got), expected, **CLOSE)


def heads():
    return config().head.heads


RELEVANT = np.zeros((B * S, F), bool)
RELEVANT[:, 1:3] = True


def compiled(run, *arguments):
    """run(head, *arguments) as one program: thousands of small ones take longer."""
    structure, state = nnx.split(drawn()[0])
    program = jax.jit(lambda state, *given: run(nnx.merge(structure, state), *given))
    return jax.device_get(program(state, *arguments))


@functools.cache
def predicted():
    """What the head says of `inputs`, and on the way there."""

    def run(head, given):
        text = head._text(given)
        clips = head._clips(given, jnp.zeros((B, S, config().head.width)))
        tokens = head._tokens(text, clips, jnp.asarray(RELEVANT))
        return {"text": text, "clips": clips, "tokens": tokens} | head(given)

    return compiled(run, inputs())


def test_the_tensors_have_the_published_shapes():
    """At the published width; 13,953,835 numbers with 1.06 million that nothing reads, and 1.06
    million are a norm, a matrix and a bias of 4096 -> 256."""
    big = config()
    big = dataclasses.replace(
        big, head=dataclasses.replace(big.head, width=256, heads=8, layers=2),
        clip_features=ClipFeaturesConfig(768, 1.0, "by hand"), text_features=None,
        language=dataclasses.replace(big.language, width=4096),
    )  # fmt: skip
    head = nnx.eval_shape(lambda: cg_detr.CgDetrHead(big, rngs=Rngs(0)))
    leaves = flatten(nnx.to_pure_dict(nnx.state(head)))
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in leaves.items()}
    unused = {"linear": 4096 * 256 + 256, "norm": 2 * 4096}
    positions = 100 * 256 + 2 * 256  # of at most 100 words, read by nothing either
    assert sum(sizes.values()) == 13_953_835 - sum(unused.values()) - positions
    assert leaves["clip_proj/linear1/kernel"].shape == (770, 256)
    assert leaves["encoder/layers/layer2/feed_forward/fc1/kernel"].shape == (256, 1024)


def test_norms_add_what_those_of_pytorch_add():
    """But those of the pooling of patches, which the release does not have."""
    head = nnx.eval_shape(lambda: cg_detr.CgDetrHead(micro(("cg_detr",)), rngs=Rngs(0)))
    found = {"/".join(map(str, path)): module.epsilon for path, module in nnx.iter_graph(head)
             if isinstance(module, LayerNorm)}  # fmt: skip
    assert len(found) > 25
    assert {path for path, epsilon in found.items() if epsilon != 1e-5} == {
        "pool/mlp_norm", "pool/query_norm"}  # fmt: skip


def test_in_and_out_again_bit_for_bit():
    _, leaves, _ = drawn()
    rows = cg_detr_rows(config().head.layers, "", "")
    tensors = export_leaves(rows, leaves)
    assert tensors["transformer.encoder.layers.0.activation.weight"].shape == (1,)
    assert tensors["global_rep_pos"].shape == (1, config().head.width)
    back = import_leaves(rows, tensors)
    assert back.keys() == leaves.keys()
    assert all(back[path].tobytes() == leaf.tobytes() for path, leaf in leaves.items())


def test_words_dummies_clips_and_places():
    w = drawn()[2]
    texts, seen = predicted()["text"], predicted()["clips"]
    for b, s, words, prompt, features in each():
        n = b * S + s
        expected, dummies = reference.text(w, words, prompt, heads())
        # The state at the slot stands behind the padding here, and words have no positions.
        got = np.concatenate([texts.words[n, : WORDS[b, s]], texts.words[n, -1:]])
        close(got, expected)
        close(texts.dummies[n], dummies)
        states, places = reference.clips(w, features)
        close(seen.states[n, : CLIPS[b]], states)
        close(seen.position[n, : CLIPS[b]], places)


def test_readers_token_encoder_and_saliency():
    """Each block on what the reference gives the block."""
    w = drawn()[2]
    _, _, words, prompt, features = next(each())
    words, dummies = reference.text(w, words, prompt, heads())
    x, places = reference.clips(w, features)
    read, weights = reference.read_text(w, x, places, words, dummies, heads())
    to_words = weights[:, reference.DUMMIES :].sum(1)
    token = reference.saliency_token(w, x, to_words)
    memory, whole, saliency = reference.remember(w, read, places, token, heads())
    keys, key_places = (np.concatenate(pair) for pair in (
        (dummies, words), (w["dummy_rep_pos"], np.zeros_like(words))))  # fmt: skip
    is_word = np.arange(len(keys)) >= reference.DUMMIES

    def run(head, x, places, keys, read, to_words, token, memory, whole):
        state, found = x, []
        for layer in head.readers.values():
            state, attention = layer(
                state, places, keys, jnp.asarray(key_places, jnp.float32),
                jnp.ones(keys.shape[:2], bool), is_word,
            )  # fmt: skip
            found.append(attention)
        shown = cg_detr.head._Clips(x, places, jnp.ones(x.shape[:2], bool))
        made = head._saliency_token(shown, to_words)[:, None]
        for layer in head.readers.values():
            made = layer.after(made, jnp.zeros_like(made))
        both = jnp.concatenate([token, read], axis=1)
        at = jnp.concatenate([head.embed["prompt_place"][...][None, None], places], axis=1)
        remembered = head.encoder(both, at, jnp.ones(both.shape[:2], bool))
        seen = jnp.sum(head.saliency_clip(memory) * head.saliency_token(whole), axis=-1)
        return state, sum(found) / len(found), made, remembered, seen

    given = (x, places, keys, read, to_words, token[None], memory, whole[None])
    got = compiled(run, *(np.asarray(array[None], np.float32) for array in given))
    state, attention, made, remembered, seen = (array[0] for array in got)
    close(state, read)
    close(attention, weights)
    close(made[0], token)
    close(remembered[0], whole)
    close(remembered[1:] + remembered[:1], memory)
    close(seen / np.sqrt(x.shape[1]), saliency)


def test_decoder():
    w, rng = drawn()[2], np.random.default_rng(2)
    memory, places = rng.normal(size=(2, F, config().head.width))
    logits, spans = reference.decode(w, memory, places, heads())
    given = (x[None].astype(np.float32) for x in (memory, places))
    got = compiled(lambda head, *x: head.decoder(*x, jnp.ones((1, F), bool)), *given)
    close(got[0][0], logits)
    close(got[1][0], spans)
    # Layers differ, and not every anchor stays where it began.
    assert np.abs(np.diff(spans, axis=0)).max() > 0.05


def test_a_batch_of_unequal_lengths_end_to_end():
    _, _, w = drawn()
    largest = 0.0
    for b, s, words, prompt, features in each():
        expected = reference.run(w, words, prompt, features, heads())
        for name, value in expected.items():
            got = predicted()[name][b, s]
            got = got[: CLIPS[b]] if name in ("saliency", "relevance") else got
            close(got, value)
            largest = max(largest, np.abs(got - value).max())
    assert largest > 0  # float32 and float64


@pytest.mark.parametrize("name, change", [
    ("words", lambda x: x[:, ::-1]), ("prompt", lambda x: -x), ("features", lambda x: x[::-1]),
])  # fmt: skip
def test_the_reference_reads_all_that_it_gets(name, change):
    _, _, w = drawn()
    _, _, words, prompt, features = next(each())
    given = {"words": words, "prompt": prompt, "features": features}
    one = reference.run(w, **given, heads=heads())
    other = reference.run(w, **given | {name: change(given[name])}, heads=heads())
    assert all(np.abs(one[key] - other[key]).max() > 1e-3 for key in one), name


def test_tokens_that_only_losses_read():
    w, got = drawn()[2], predicted()["tokens"]
    for b, s, words, prompt, features in each():
        n, count = b * S + s, CLIPS[b]
        words, dummies = reference.text(w, words, prompt, heads())
        x, places = reference.clips(w, features)
        inside = RELEVANT[n, :count]
        want = reference.tokens_for_losses(w, x, places, inside, words, dummies, heads())
        for name in ("sentence", "dummy_sentence", "moment", "other"):
            close(got[name][n], want[name])
        rows = np.empty((count, x.shape[1]))
        rows[inside], rows[~inside] = want["moment_rows"], want["other_rows"]
        close(got["clip_match"][n, :count], rows @ want["moment"])
        known = np.concatenate([want["dummy_sentence_rows"], want["sentence_rows"]])
        alike = reference.softmax(want["moment_rows"] @ known.T)
        used = np.flatnonzero(np.concatenate(
            [np.ones(reference.DUMMIES, bool), inputs().prompt_valid[b, s], [True]]))  # fmt: skip
        target = got["attention_target"][n, :count][inside][:, used]
        close(target, alike)


def test_text_features_are_as_wide_as_the_states_that_join_them():
    base = micro(("cg_detr",))
    with pytest.raises(ValueError, match=r"text_features.width=24: must be language.width=32"):
        dataclasses.replace(base, text_features=TextFeaturesConfig(24, R, "by hand"))
    light = dataclasses.replace(micro(("temporal",)), text_features=config().text_features)
    with pytest.raises(ValueError, match=r"none of heads=\('temporal',\) reads them"):
        FunctionalModel(light)
