"""Heads of VideoChat-TPO: in and out again, and each the function of the published tensors."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.interop.families.configs import VIDEOCHAT
from tests.interop.families.published_folder import same_tensors, train_heads
from tests.interop.families.videochat_release import (
    ROWS,
    published_keys,
    random_leaves,
    write_release,
)
from tpo_jax.interop import folder
from tpo_jax.interop.export import largest_difference
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.folder import export_family, import_family
from tpo_jax.interop.families.registry import family_of, from_leaves, to_leaves
from tpo_jax.interop.families.tpo_heads import SAM2, release_rows
from tpo_jax.interop.mapping import MappingError
from tpo_jax.interop.tensors import LazyArray
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import HeadInputs, tokens_of
from tpo_jax.models.heads.sam2.model import Sam2
from tpo_jax.models.layers import Rngs
from tpo_jax.models.sam2_config import SIZES
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

LOADED = ("region_mlp", "sam2")
# The first release of SAM 2 at the size of tests, as an option of config.json would say it.
TINY_SAM2 = dataclasses.asdict(
    dataclasses.replace(SIZES["micro"], pointer_times=False, occlusion_embedding=False)
)
DATA = copy.deepcopy(VIDEOCHAT)
DATA["llm_config"]["vocab_size"] = ROWS
DATA["sam2_config"] = TINY_SAM2
FREQUENCIES = [f"heads/sam2/network/{part}/frequencies"
               for part in ("image_positions", "prompt_encoder/positions")]  # fmt: skip


def test_names_and_sizes_of_sam2_are_the_published_ones():
    """224,430,386 is what is left of the checkpoint's total_size for SAM 2."""
    names = {key for key in published_keys() if key.startswith("sam.")}
    network = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Sam2(SAM2, rngs=Rngs(0)))))
    found, rows = {}, {p: row for row in release_rows(SAM2, "", "sam.") for p in row.paths}
    assert rows.keys() == flatten(network).keys()
    for path, leaf in flatten(network).items():
        array = LazyArray(leaf.shape, np.dtype(ml_dtypes.bfloat16), None)
        found |= rows[path].outward(array)
    assert names - found.keys() == {"sam.no_mem_pos_enc"} and found.keys() <= names
    assert sum(int(np.prod(a.shape)) for a in found.values()) + 256 == 224_430_386


def config_of(data=DATA, heads=None):
    family = family_of(data)
    keys = {"loc_decoder.0.weight", "track_embed.layers.0.weight"}
    config = family.with_heads(family.model_config(data, {}), keys, heads, data)
    names = tokens_of(config.heads)
    return dataclasses.replace(config, tokens={t: 300 + i for i, t in enumerate(names)})


@pytest.fixture(scope="module")
def published():
    """All tensors of a tiny checkpoint, those of its temporal head and dead heads among them."""
    config = config_of()
    leaves = random_leaves(config)
    leaves[FREQUENCIES[1]] = leaves[FREQUENCIES[0]]
    family = family_of(DATA)
    tensors = from_leaves(family, config, leaves, {}, ())
    rest = [key for key in published_keys() if key not in tensors and not key.startswith("sam.")]
    rest += ["sam.no_mem_pos_enc"]
    return leaves, tensors | {key: np.full(3, i, np.float32) for i, key in enumerate(rest)}


@pytest.fixture(scope="module")
def source(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    write_release(path, DATA, published[1])
    return path


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("imported") / "model"
    return path, import_family(source, path)


def test_in_and_out_again(source, model, tmp_path):
    path, lines = model
    assert "heads: region_mlp, sam2" in lines
    carried = {line.split(": ")[1] for line in lines if "carried" in line}
    assert {"temporal_token", "cg_model.query_embed.weight", "cg_criterion.empty_weight",
            "action_embed.layers.0.weight", "sam.no_mem_pos_enc"} <= carried  # fmt: skip
    assert all(key.startswith(("cg_", "temporal_", "action_", "sam.no_mem_")) for key in carried)
    config = folder.load_config(path)
    assert config.heads == LOADED and config.box_encoder == "tpo"
    assert ModelConfig.from_dict(config.to_dict()) == config
    export_family(path, tmp_path / "out", source)
    same_tensors(source, tmp_path / "out")


def test_heads_that_were_trained_without_those_of_the_release_lie_beside(source, tmp_path):
    """Theirs stay carried, ours have another box encoder, which their layout has no place for."""
    import_family(source, tmp_path / "base", {"heads": []})
    train_heads(tmp_path / "base", tmp_path / "model", ("region",))
    files = export_family(tmp_path / "model", tmp_path / "out", source)
    assert {"tpo.safetensors", "tpo_config.json"} < set(files)
    same_tensors(source, tmp_path / "out")
    lines = import_family(tmp_path / "out", tmp_path / "back")
    assert "heads: region" in lines and "  carried, not used: loc_decoder.0.weight" in lines
    assert folder.load_config(tmp_path / "back") == folder.load_config(tmp_path / "model")
    assert largest_difference(tmp_path / "back", tmp_path / "model") == 0.0


def test_a_network_with_a_place_in_the_layout_does_not_go_out_apart(source, model, tmp_path):
    with pytest.raises(FamilyError, match="which have their place in .*, so nothing goes out"):
        export_family(model[0], tmp_path / "out", source, sam2_like="sam2.1")


def test_a_network_of_another_size_has_no_place_in_the_layout(source, model, tmp_path):
    config = folder.load_config(model[0])
    other = dataclasses.replace(config, sam2=dataclasses.replace(config.sam2, memories=5))
    leaves, codec = folder.open_leaves(model[0]), folder.load_codec(model[0])
    folder.write_model(tmp_path / "model", other.to_dict(), leaves, codec)
    wanted = "sam2 is .*memories=5.* is .*memories=4.*; put a SAM 2 of that size into the model"
    with pytest.raises(FamilyError, match=wanted):
        export_family(tmp_path / "model", tmp_path / "out", source)


def float64(tensors, name):
    return (np.asarray(tensors[f"{name}.{part}"], np.float64) for part in ("weight", "bias"))


def two_layers(tensors, first, second, x):
    for name in (first, second):
        weight, bias = float64(tensors, name)
        x = x @ weight.T + bias
        x = np.maximum(x, 0) if name == first else x
    return x


def test_tokens_and_small_nets_are_the_published_functions(published, model):
    """Against float64 NumPy on the published tensors, in their own layout."""
    config, params, codec = folder.load_model(model[0])
    net, tensors = FunctionalModel(config).bind(params), published[1]
    for token, name in (("<boxes>", "box_token"), ("<tracking>", "track_token")):
        assert config.tokens[token] == codec.special_ids[token]
        vector = net.embed_tokens(jnp.array([config.tokens[token]]))
        np.testing.assert_array_equal(vector, tensors[name][0])
    rng = np.random.default_rng(1)
    states = rng.normal(size=(2, 3, config.language.width))
    inputs = HeadInputs(jnp.asarray(states, jnp.float32), None, None, None, None)
    close = {"rtol": 1e-4, "atol": 1e-4}
    boxes = two_layers(tensors, "loc_decoder.0", "loc_decoder.2", states)
    np.testing.assert_allclose(net.heads["region_mlp"](inputs)["boxes"], boxes, **close)
    prompt = two_layers(tensors, "track_embed.layers.0", "track_embed.layers.1", states)
    np.testing.assert_allclose(net.heads["sam2"].adapter(inputs.slot_states), prompt, **close)
    readout = "track_embed_decode2.layers.0", "track_embed_decode2.layers.1"
    box = two_layers(tensors, *readout, states)
    np.testing.assert_allclose(net.heads["sam2"].box_readout(inputs.slot_states), box, **close)
    drawn = rng.uniform(size=(2, 4))
    box = two_layers(tensors, "loc_encoder.0", "loc_encoder.2", drawn)
    np.testing.assert_allclose(net.encode_boxes(jnp.asarray(drawn)), box, rtol=1e-2, atol=1e-2)


def test_labels_and_frequencies_of_prompts(published, model):
    """Four tables are one leaf, one matrix is two."""
    leaves, tensors = folder.open_leaves(model[0]), published[1]
    labels = np.asarray(leaves["heads/sam2/network/prompt_encoder/labels"])
    for i in range(4):
        name = f"sam.sam_prompt_encoder.point_embeddings.{i}.weight"
        np.testing.assert_array_equal(labels[i : i + 1], tensors[name])
    matrix = tensors["sam.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    for path in FREQUENCIES:
        np.testing.assert_array_equal(leaves[path], matrix)


@pytest.mark.long
def test_the_mask_head_reads_the_published_dtype_as_float32(model):
    """An imported folder is bfloat16; what it answers is that of the same numbers in float32."""
    config, params, _ = folder.load_model(model[0])
    rng, net = np.random.default_rng(2), FunctionalModel(config)
    states = rng.normal(size=(1, 1, config.language.width)).astype(np.float32)
    frames = rng.integers(0, 256, (1, 2, *[config.vision.image_size] * 2, 3), np.uint8)

    @jax.jit
    def answer(params):
        return net.bind(params).run_head("sam2", states, None, frames, np.ones((1, 2), bool))

    low, high = answer(params), answer(jax.tree.map(lambda x: x.astype(np.float32), params))
    for name in ("masks", "presence"):
        assert low[name].dtype == jnp.float32 and np.isfinite(low[name]).all()
        np.testing.assert_allclose(low[name], high[name], rtol=1e-3, atol=1e-3)


def test_frequencies_that_differ_are_refused(published):
    leaves = dict(published[0])
    leaves[FREQUENCIES[1]] = leaves[FREQUENCIES[0]] + 1
    with pytest.raises(MappingError, match="image_positions/frequencies differ"):
        from_leaves(family_of(DATA), config_of(), leaves, {}, ())


@pytest.mark.parametrize("name, reason", [
    ("temporal", "is CG-DETR, which is called cg_detr"), ("region", "region_mlp"),
    ("count", r"heads that do: \['region_mlp', 'sam2', 'cg_detr'\]"),
])  # fmt: skip
def test_a_head_of_another_function_is_refused_by_name(source, tmp_path, name, reason):
    with pytest.raises(FamilyError, match=f"heads: '{name}' does not load .*{reason}"):
        import_family(source, tmp_path / "model", {"heads": name})


def test_heads_can_be_left_out_and_are_carried_then(published):
    family, tensors = family_of(DATA), published[1]
    config = config_of(heads=[])
    leaves, carried = to_leaves(family, config, tensors)
    assert not config.heads and not any(path.startswith("heads/") for path in leaves)
    assert {"box_token", "loc_decoder.0.weight", "sam.maskmem_tpos_enc"} <= carried.keys()
    one = config_of(heads=["region_mlp"])
    leaves, carried = to_leaves(family, one, tensors)
    assert "heads/region_mlp/mlp/fc1/kernel" in leaves and "task_tokens/region" in leaves
    assert "sam.maskmem_tpos_enc" in carried and "box_token" not in carried


def test_a_tokenizer_without_task_tokens_is_refused(source, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json"):
        (bare / name).write_bytes((source / name).read_bytes())
    text = (source / "tokenizer.json").read_text().replace("<boxes>", "<other>")
    (bare / "tokenizer.json").write_text(text)
    with pytest.raises(FamilyError, match=r"has no \['<boxes>'\]"):
        import_family(bare, tmp_path / "model")
