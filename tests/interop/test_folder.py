import dataclasses
import json

import jax
import jax.numpy as jnp
import memory_bucket
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.interop import folder, tensors
from tpo_jax.interop.folder import (
    ModelFolderError,
    added_tokens,
    load_config,
    load_into,
    load_model,
    save_model,
)
from tpo_jax.models.presets import preset
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten

USED = 300


@pytest.fixture
def codec():
    return TextCodec(train_tokenizer(["a red square moves", "it is blue"], USED))


@pytest.fixture
def model_config():
    return preset("micro")


def make_params(dtype=np.float32):
    random = np.random.default_rng(0)
    return {
        "language": {
            "embed": {"table": random.normal(size=(1024, 8)).astype(dtype)},
            "lm_head": {"kernel": random.normal(size=(8, 1024)).astype(dtype)},
        },
        "vision": {"layers": {"kernel": random.normal(size=(2, 4, 4)).astype(dtype)}},
        "scale": np.float32(np.pi) * np.ones((), dtype),
    }


def abstract(params, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params)


def test_a_folder_does_not_say_how_the_model_runs(tmp_path, codec, model_config):
    """A model of a run on a TPU answers on a CPU, also one of before folders left this out."""
    chosen = model_config.running(attention="splash", remat="full")
    save_model(tmp_path / "model", chosen, make_params(), codec)
    about = json.loads((tmp_path / "model/config.json").read_text())
    assert not {"attention", "remat"} & {*about["language"], *about["vision"]}
    about["language"] |= {"attention": "splash", "remat": True}
    about["vision"]["remat"] = True
    (tmp_path / "model/config.json").write_text(json.dumps(about))
    assert load_config(tmp_path / "model") == model_config
    about["language"]["attention"] = "flash"
    (tmp_path / "model/config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="language.attention='flash': use one of"):
        load_config(tmp_path / "model")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_bit_identical(tmp_path, codec, model_config, dtype):
    params = make_params(dtype)
    save_model(tmp_path / "model", model_config, params, codec)
    got_config, got, got_codec = load_model(tmp_path / "model")
    assert got_config == model_config
    assert got_codec.encode("it is red") == codec.encode("it is red")
    assert flatten(got).keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        mine = flatten(got)[path]
        assert (mine.dtype, mine.shape) == (leaf.dtype, leaf.shape)
        assert mine.tobytes() == leaf.tobytes()
    preprocessor = json.loads((tmp_path / "model/preprocessor.json").read_text())
    assert preprocessor["image_size"] == model_config.vision.image_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_shards_stay_below_the_limit_and_are_plain_safetensors(
    tmp_path, codec, model_config, monkeypatch
):
    monkeypatch.setattr(folder, "SHARD_BYTES", 50_000)
    params = make_params()
    save_model(tmp_path / "model", model_config, params, codec)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = []
    for file in files:
        assert file.stat().st_size <= 50_000
        with safe_open(file, framework="np") as reader:
            names += reader.keys()
    assert sorted(names) == sorted(flatten(params))
    files[1].unlink()
    with pytest.raises(ModelFolderError, match=r"1 parameter shards of 2; copy"):
        load_model(tmp_path / "model")


def test_saving_again_replaces_the_folder(tmp_path, codec, model_config):
    save_model(tmp_path / "model", model_config, make_params(), codec)
    (tmp_path / "model/stale.txt").write_text("old")
    changed = jax.tree.map(lambda x: x + 1, make_params())
    save_model(tmp_path / "model", model_config, changed, codec)
    _, got, _ = load_model(tmp_path / "model")
    np.testing.assert_array_equal(got["scale"], changed["scale"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not (tmp_path / "model/stale.txt").exists()


def test_a_failing_save_leaves_the_old_folder(tmp_path, codec, model_config, monkeypatch):
    save_model(tmp_path / "model", model_config, make_params(), codec)
    monkeypatch.setattr(TextCodec, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "model", model_config, {"scale": np.zeros(())}, codec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    monkeypatch.undo()
    _, got, _ = load_model(tmp_path / "model")
    assert flatten(got).keys() == flatten(make_params()).keys()


def test_incomplete_and_broken_folders_are_named(tmp_path, codec, model_config):
    with pytest.raises(ModelFolderError, match="config.json: missing"):
        load_config(tmp_path)
    save_model(tmp_path / "model", model_config, make_params(), codec)
    (shard,) = (tmp_path / "model").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelFolderError, match="not a safetensors file"):
        load_model(tmp_path / "model")
    shard.write_bytes(b"\x08\0\0\0\0\0\0\0rubbish!")
    with pytest.raises(ModelFolderError, match="not a safetensors file"):
        load_into(abstract(make_params()), tmp_path / "model")


def test_load_into_lists_every_leaf_that_does_not_fit(tmp_path, codec, model_config):
    save_model(tmp_path / "model", model_config, make_params(), codec)
    want = abstract(make_params())
    want["heads"] = {"region": want.pop("scale"), "mask": jax.ShapeDtypeStruct((2,), jnp.float32)}
    want["vision"]["layers"]["kernel"] = jax.ShapeDtypeStruct((2, 4, 5), jnp.float32)
    with pytest.raises(ModelFolderError) as error:
        load_into(want, tmp_path / "model", init_missing=["heads/mask"])
    message = str(error.value)
    assert "heads/region: not in the folder" in message
    assert "scale: in the folder only" in message
    assert "vision/layers/kernel: folder has [2, 4, 4], this model [2, 4, 5]" in message
    assert "heads/mask" not in message and "language" not in message
    with pytest.raises(ModelFolderError, match="'haeds/' matches no parameter"):
        load_into(abstract(make_params()), tmp_path / "model", init_missing=["haeds/"])


def test_load_into_leaves_allowed_gaps_to_the_caller(tmp_path, codec, model_config):
    save_model(tmp_path / "model", model_config, make_params(), codec)
    want = abstract(make_params()) | {"heads": {"mask": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    loaded = load_into(want, tmp_path / "model", init_missing=["heads/"])
    assert loaded.missing == ("heads/mask",)
    assert loaded.leaves.keys() == flatten(make_params()).keys()


def test_load_into_casts_and_places(tmp_path, codec, model_config):
    params = make_params()
    save_model(tmp_path / "model", model_config, params, codec)
    mesh = make_mesh({"fsdp": 8})
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    want = abstract(params)
    wide = jax.ShapeDtypeStruct((1024, 8), jnp.bfloat16, sharding=rows)
    want["language"]["embed"]["table"] = wide
    loaded = load_into(want, tmp_path / "model")
    table = loaded.leaves["language/embed/table"]
    assert table.sharding == rows and table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(table, params["language"]["embed"]["table"].astype(jnp.bfloat16))


def test_new_tokens_start_at_the_mean_of_the_used_rows(tmp_path, codec, model_config):
    params = make_params()
    save_model(tmp_path / "model", model_config, params, codec)
    used = codec.vocab_size
    add_task_tokens(codec.tokenizer, ["region"])
    wider = TextCodec(codec.tokenizer)
    new_config = dataclasses.replace(model_config, heads=("region",), tokens=wider.task_tokens)
    new = added_tokens(load_config(tmp_path / "model"), new_config)
    assert new == tuple(range(used, used + 3))  # <box_begin>, <boxes>, <track_box>
    loaded = load_into(abstract(params), tmp_path / "model", new_tokens=new)
    table, head = (loaded.leaves[f"language/{name}"] for name in ("embed/table", "lm_head/kernel"))
    old_table = params["language"]["embed"]["table"]
    old_head = params["language"]["lm_head"]["kernel"]
    np.testing.assert_allclose(
        table[list(new)], np.tile(old_table[:used].mean(0), (3, 1)), rtol=1e-5
    )
    np.testing.assert_allclose(
        head[:, list(new)], np.tile(old_head[:, :used].mean(1)[:, None], (1, 3)), rtol=1e-5
    )
    others = np.delete(np.arange(1024), list(new))
    np.testing.assert_array_equal(table[others], old_table[others])
    np.testing.assert_array_equal(head[:, others], old_head[:, others])
    roomy = abstract(params)
    roomy["language"]["embed"]["table"] = jax.ShapeDtypeStruct((1152, 8), jnp.float32)
    roomy["language"]["lm_head"]["kernel"] = jax.ShapeDtypeStruct((8, 1152), jnp.float32)
    loaded = load_into(roomy, tmp_path / "model", new_tokens=[1024])
    table, head = (loaded.leaves[f"language/{name}"] for name in ("embed/table", "lm_head/kernel"))
    np.testing.assert_array_equal(table[:1024], old_table)
    np.testing.assert_allclose(table[1024], old_table[:used].mean(0), rtol=1e-5)
    np.testing.assert_allclose(head[:, 1024], old_head[:, :used].mean(1), rtol=1e-5)
    assert not table[1025:].any() and not head[:, 1025:].any()
    with pytest.raises(ModelFolderError, match="token id 5 is new"):
        load_into(abstract(params), tmp_path / "model", new_tokens=[5])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("axis, turned", [(0, False), (1, False), (1, True)])
def test_the_mean_for_new_tokens_is_read_in_blocks(tmp_path, monkeypatch, dtype, axis, turned):
    """The numbers of a whole table in memory, from no more than a block at a time; of parts that
    hold no new token nothing else is read."""
    monkeypatch.setattr(tensors, "BLOCK_BYTES", block := 2**14)
    table = np.random.default_rng(1).normal(size=(2048, 64)).astype(dtype)
    stored = table.T if axis and not turned else table
    file = folder.epath.Path(tmp_path / "a.safetensors")
    tensors.write_file(file, {"x": tensors.lazy(np.ascontiguousarray(stored))}, {})
    (array,) = tensors.read_file(file).values()
    array = tensors.transposed(array) if turned else array
    used, new = 2000, [2001, 2040]
    expected = table.copy()
    expected[new] = table[:used].astype(np.float32).mean(axis=0).astype(dtype)
    read = []

    def counted(index, real=array.read):
        part = real(index)
        read.append(part.nbytes)
        return part

    counting = dataclasses.replace(array, read=counted)
    filled = folder._fill_new_tokens(counting, axis, used, new)
    places = (slice(None),) * axis
    old, last = filled[(*places, slice(0, 64))], filled[(*places, slice(1984, 2048))]
    np.testing.assert_array_equal(np.moveaxis(old, axis, 0), expected[:64])
    np.testing.assert_array_equal(np.moveaxis(last, axis, 0), expected[1984:])
    assert max(read) <= block and len(read) > 8
    assert sum(read) == old.nbytes + last.nbytes + used * table[0].nbytes
    np.testing.assert_array_equal(np.moveaxis(np.asarray(filled), axis, 0), expected)
    assert read[-1] == table.nbytes  # the mean is known


def test_a_token_with_two_ids_is_refused(model_config):
    old = dataclasses.replace(model_config, tokens={"<boxes>": 1000})
    new = dataclasses.replace(model_config, tokens={"<boxes>": 1001})
    with pytest.raises(ModelFolderError, match=r"token <boxes>: id 1000 .* 1001"):
        added_tokens(old, new)


def test_a_folder_in_a_bucket_is_written_replaced_and_read(monkeypatch, codec, model_config):
    memory_bucket.install(monkeypatch)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        params = make_params(dtype)
        save_model("gs://bucket/run/model", model_config, params, codec)
        config, got, _ = load_model("gs://bucket/run/model")
        assert config == model_config
        assert flatten(got)["scale"].tobytes() == params["scale"].tobytes()
        folder.check_fits(abstract(params), "gs://bucket/run/model")
