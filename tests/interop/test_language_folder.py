"""Hugging Face folders of language models in and out again, without torch."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from language_folders import CONFIGS, GOLDEN, GOLDEN_EVERY, tokens_of, write_folder

from tpo_jax.data.text import TextCodec, train_tokenizer
from tpo_jax.interop import folder, huggingface, tensors
from tpo_jax.interop.chat_template import ChatTemplateError, stop_tokens
from tpo_jax.interop.check_language import forward
from tpo_jax.interop.export import ExportFolderError, export_model, import_model
from tpo_jax.interop.huggingface import HuggingFaceError, language_config
from tpo_jax.interop.mapping import MappingError, export_leaves
from tpo_jax.interop.tensors import TensorFileError
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import unflatten
from tpo_jax.training.start import make_model_config, may_be_missing


def read_all(path):
    return {k: np.asarray(v) for k, v in huggingface.read_tensors(path).items()}


def read_leaves(path):
    return {k: np.asarray(v) for k, v in folder.open_leaves(path).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_there_and_back_is_bit_identical(tmp_path, name, dtype, monkeypatch):
    # Small blocks and small files: every tensor is read in several pieces and there is an index.
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 70_000)
    published = write_folder(tmp_path / "source", name, dtype=dtype)
    import_model(tmp_path / "source", tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "exported")
    assert_same(read_all(tmp_path / "exported"), published)
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    assert len(files) >= 2 and all(file.stat().st_size < 75_000 for file in files)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        out, source = (tmp_path / which / name for which in ("exported", "source"))
        assert out.read_bytes() == source.read_bytes()
    import_model(tmp_path / "exported", tmp_path / "back")
    assert_same(*(read_leaves(tmp_path / which) for which in ("model", "back")))
    assert folder.load_language(tmp_path / "model") == folder.load_language(tmp_path / "back")


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_are_those_of_transformers(tmp_path, name):
    """Without torch; tests/parity has every family, and more of each."""
    write_folder(tmp_path / "source", name)
    source = huggingface.open_language(tmp_path / "source")
    params = unflatten({path: np.asarray(leaf) for path, leaf in source.leaves.items()})
    tokens = tokens_of(name)
    positions = np.arange(tokens.size)[None]
    *_, logits = forward(
        source.config, params["language"], tokens, positions, np.ones_like(tokens)
    )
    with np.load(GOLDEN) as golden:
        want = golden[name]
    np.testing.assert_allclose(logits[0, :, ::GOLDEN_EVERY], want, atol=2e-4)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_written_config_means_what_was_read(tmp_path, name):
    write_folder(tmp_path / "source", name)
    config = language_config(json.loads((tmp_path / "source/config.json").read_text()))
    written = huggingface.huggingface_config(config, config.num_tokens)
    assert language_config(json.loads(json.dumps(written))) == config


def test_the_vocabulary_is_padded_with_zeros(tmp_path):
    published = write_folder(tmp_path / "source", "llama")
    source = huggingface.open_language(tmp_path / "source")
    assert (source.config.vocab_size, source.config.num_tokens) == (384, 331)
    table, head = (source.leaves[f"language/{n}"] for n in ("embed/table", "lm_head/kernel"))
    assert table.shape[0] == head.shape[1] == 384
    assert not np.any(table[331:]) and not np.any(head[:, 331:])
    np.testing.assert_array_equal(head[:, 300:340][:, :31], published["lm_head.weight"][300:].T)


def test_a_padded_row_in_use_is_not_cut_off(tmp_path):
    write_folder(tmp_path / "source", "llama")
    import_model(tmp_path / "source", tmp_path / "model")
    leaves = read_leaves(tmp_path / "model")
    leaves["language/embed/table"][380] = 1.0
    rows = huggingface.language_rows(folder.load_language(tmp_path / "model")[0], 331)
    with pytest.raises(MappingError, match="embed/table: entries from 331 on are not zero"):
        export_leaves(rows, leaves)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "type='longrope'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "slope": 1}}, "slope=1"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1}}, "mscale=1"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"model_type": "gemma"}, "model_type='gemma'"),
        ("mistral", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}, "layer_types"),
    ],
)
def test_what_this_program_does_not_have_is_refused_by_name(name, changes, message):
    from language_folders import _COMMON

    with pytest.raises(HuggingFaceError, match=message):
        language_config({**_COMMON, **CONFIGS[name], **changes})


def test_defaults_are_those_of_the_published_classes():
    common = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
              "intermediate_size": 8, "vocab_size": 256}  # fmt: skip
    mistral = language_config({"model_type": "mistral", **common, "num_attention_heads": 8})
    assert (mistral.sliding_window, mistral.kv_heads) == (4096, 8)
    assert language_config({"model_type": "llama", **common}).kv_heads == 4
    qwen3 = language_config({"model_type": "qwen3", **common, "num_key_value_heads": 2})
    assert (qwen3.head_dim, qwen3.qkv_bias, qwen3.sliding_window) == (128, False, None)
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert language_config({"model_type": "llama", **common, **newer}).rope_theta == 7.0


def test_sizes_that_a_config_leaves_out_are_those_of_its_class():
    """llava-1.5's text_config is of a Vicuna of 7B, whose sizes are the defaults of Llama."""
    vicuna = language_config({"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5})
    assert (vicuna.width, vicuna.depth, vicuna.heads, vicuna.mlp_width) == (4096, 32, 32, 11008)
    assert (vicuna.kv_heads, vicuna.head_dim, vicuna.num_tokens) == (32, 128, 32064)
    assert language_config({"model_type": "mistral"}).kv_heads == 8
    many = {"model_type": "qwen2", "num_attention_heads": 16, "num_key_value_heads": None}
    assert language_config(many).kv_heads == 16


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    write_folder(tmp_path / "source", "llama", files=1)
    for file in (tmp_path / "source").glob("model*"):
        file.unlink()
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin", "training_args.bin"):
        (tmp_path / "source" / name).write_bytes(b"\x80")
    with pytest.raises(HuggingFaceError) as error:
        import_model(tmp_path / "source", tmp_path / "model")
    message = str(error.value)
    assert "torch.load(" in message and "weights_only=True" in message
    assert "['pytorch_model-1.bin', 'pytorch_model-2.bin']" in message
    compile(message.split("\n\n")[1].replace("\n  ", "\n").removeprefix("  "), "snippet", "exec")
    assert not (tmp_path / "model").exists()


def test_broken_folders_are_named(tmp_path):
    source = tmp_path / "source"
    write_folder(source, "llama")
    (source / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ChatTemplateError, match="--chat_template"):
        import_model(source, tmp_path / "model")
    template = (
        "{{ messages[0]['content'] }}"
        "{% for m in messages[1:] %}{{ m['content'] }}<eos>{% endfor %}"
    )
    import_model(source, tmp_path / "model", template)
    codec = TextCodec.load(tmp_path / "model")
    assert codec.decode(codec.build_branch("a red", "circle").ids) == "a redcircle"
    (source / "tokenizer.json").unlink()
    with pytest.raises(HuggingFaceError, match="tokenizer.json: missing; write it"):
        import_model(source, tmp_path / "other")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))
    with pytest.raises(MappingError, match="not what config.json describes"):
        import_model(source, tmp_path / "other")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TensorFileError, match="the index names it"):
        import_model(source, tmp_path / "other")
    write_folder(tmp_path / "fine", "llama")
    with pytest.raises(ExportFolderError, match="in the Hugging Face layout already"):
        export_model(tmp_path / "fine", tmp_path / "exported")


@pytest.mark.parametrize(
    ("generation", "config", "special", "stops"),
    [
        ({"eos_token_id": [11, 2, 1]}, {"eos_token_id": 0}, {}, ("<eos>", "<bos>")),
        ({"eos_token_id": 2}, {}, {}, ("<eos>",)),
        ({"temperature": 1.0}, {"eos_token_id": [11, 1]}, {}, ("<bos>",)),
        ({}, {"text_config": {"eos_token_id": 1}}, {}, ("<bos>",)),
        ({}, {}, {"eos_token": {"content": "<eos>"}}, ("<eos>",)),
        ({}, {}, {}, ()),
    ],
)
def test_stops_come_from_the_file_that_generation_reads(
    tmp_path, generation, config, special, stops
):
    """generation_config.json, then config.json, then the tokenizer's; the end itself is none."""
    tokenizer = train_tokenizer(["a"], 270)
    path = folder.epath.Path(tmp_path)
    for name, values in (("generation_config", generation), ("config", config),
                         ("tokenizer_config", special)):  # fmt: skip
        (path / f"{name}.json").write_text(json.dumps(values))
    assert stop_tokens(path, tokenizer, tokenizer.id_to_token(11)) == stops


@pytest.mark.parametrize("number", [331, -1, 2**40, "<eos>"])
def test_a_stop_outside_of_the_vocabulary_is_refused(tmp_path, number):
    write_folder(tmp_path / "source", "qwen2")
    file = tmp_path / "source/generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, number]}))
    message = rf"generation_config.json: eos_token_id has {number!r}, expected ids of tokenizer"
    with pytest.raises(ChatTemplateError, match=message):
        import_model(tmp_path / "source", tmp_path / "model")


def test_published_stops_reach_the_model_folder_and_go_back_out(tmp_path):
    """Of a language folder as they came, of a model that was trained on it in a file like it."""
    source, model, out = (tmp_path / name for name in ("source", "model", "out"))
    write_folder(source, "qwen2")
    codec = folder.load_codec(source)
    assert codec.template.stops == ()  # one id, the end of the chat template
    stops = [codec.eos_id, codec.special_ids["<eos>"]]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    import_model(source, model)
    for path in (source, model):
        assert folder.load_codec(path).stop_ids == tuple(stops)
    assert json.loads((model / "template.json").read_text())["stops"] == ["<eos>"]
    export_model(model, out)
    name = "generation_config.json"
    assert (out / name).read_bytes() == (source / name).read_bytes()

    config, codec = folder.load_config(source, preset("micro")), folder.load_codec(model)
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), FunctionalModel(config).abstract()
    )
    folder.save_model(tmp_path / "trained", config, params, codec)
    export_model(tmp_path / "trained", tmp_path / "whole")
    inner = tmp_path / "whole/language_model"
    assert json.loads((inner / name).read_text())["eos_token_id"] == stops
    assert huggingface.open_codec(inner).template == codec.template
    import_model(tmp_path / "whole", tmp_path / "back")
    assert folder.load_codec(tmp_path / "back").stop_ids == tuple(stops)


def test_known_extras_are_listed_and_others_refused(tmp_path):
    published = write_folder(tmp_path / "source", "qwen2", files=1)
    extra = {"lm_head.weight": published["model.embed_tokens.weight"],
             "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}  # fmt: skip
    file = tmp_path / "source/model-00001-of-00001.safetensors"
    (tmp_path / "source/model.safetensors.index.json").unlink()
    file = file.rename(tmp_path / "source/model.safetensors")
    safetensors.numpy.save_file(published | extra, file)
    assert huggingface.open_language(tmp_path / "source").ignored == tuple(sorted(extra))
    safetensors.numpy.save_file(published | {"model.adapter": np.ones(1)}, file)
    with pytest.raises(MappingError, match="no row uses.*model.adapter"):
        huggingface.open_language(tmp_path / "source")


@pytest.mark.parametrize("layout", ["model", "source"])
def test_training_starts_from_either_layout_and_reads_only_its_own_bytes(
    tmp_path, layout, monkeypatch
):
    """Each of eight devices asks for its eighth; together that is every byte once, also where their
    rows are columns of the file."""
    write_folder(tmp_path / "source", "mistral")
    import_model(tmp_path / "source", tmp_path / "model")
    path = tmp_path / layout
    base = preset("micro")
    config = folder.load_config(path, base)
    assert config.language.sliding_window == 5 and config.vision == base.vision
    assert (config.heads, config.language.attention) == ((), base.language.attention)
    with pytest.raises(folder.ModelFolderError, match="name model.preset"):
        folder.load_config(path)

    leaves = folder.open_leaves(path)
    rows = jax.NamedSharding(make_mesh({"fsdp": 8}), jax.P(None, "fsdp"))
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=rows)
        for name, leaf in leaves.items() if name.endswith("mlp/down_proj/kernel")
    }  # fmt: skip
    (name,) = wanted
    whole = np.asarray(leaves[name])
    read = []
    real = tensors._fill_run

    def counted(out, stream, start):
        read.append(out.nbytes)
        real(out, stream, start)

    monkeypatch.setattr(tensors, "_fill_run", counted)
    monkeypatch.setattr(folder, "_check_names", lambda *_: ())
    loaded = folder.load_into(wanted, path)
    np.testing.assert_array_equal(loaded.leaves[name], whole)
    assert sum(read) == whole.nbytes and (len(read) >= 8) == (layout == "model")


def test_a_tensor_is_in_memory_once(tmp_path, monkeypatch):
    """Copying, transposing and padding a tensor takes its size and some blocks."""
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 2**16)
    big = np.random.default_rng(0).normal(size=(4000, 512)).astype(np.float32)
    safetensors.numpy.save_file({"x": big}, tmp_path / "a.safetensors")
    (array,) = tensors.read_file(folder.epath.Path(tmp_path / "a.safetensors")).values()
    for name, changed, limit in (
        ("copied", array, 2**19),
        ("turned", tensors.transposed(tensors.resized(array, 4096)), 1.1 * big.nbytes),
    ):
        out = folder.epath.Path(tmp_path / f"{name}.safetensors")
        tracemalloc.start()
        tensors.write_file(out, {"x": changed}, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit, (name, peak)
    turned = safetensors.numpy.load_file(tmp_path / "turned.safetensors")["x"]
    np.testing.assert_array_equal(turned[:, :4000], big.T)
    assert turned.shape == (512, 4096) and not turned[:, 4000:].any()


def test_a_run_gets_its_language_model_from_the_folder_and_the_rest_from_its_preset(tmp_path):
    from tests import tiny_run

    published = write_folder(tmp_path / "source", "qwen3")
    config = tiny_run.get_config(f"data={tmp_path},heads=True,init_from={tmp_path / 'source'}")
    config.init_missing = ["vision/", "connector/", "task_tokens/", "box_encoder/", "heads/"]
    config.lora.update(rank=2, alpha=4.0)
    model_config, codec = make_model_config(config)
    assert model_config.language.qk_norm and model_config.language.head_dim == 24
    assert model_config.visual_offset == codec.template.visual_offset > 2
    first = folder.load_codec(tmp_path / "source").vocab_size
    new = folder.added_tokens(folder.load_config(tmp_path / "source", model_config), model_config)
    assert new == tuple(range(first, first + 5))
    loaded = folder.load_into(
        FunctionalModel(model_config).abstract(), tmp_path / "source",
        init_missing=may_be_missing(config), new_tokens=new,
    )  # fmt: skip
    assert {path.split("/")[0] for path in loaded.leaves} == {"language"}
    adapters = [path for path in loaded.missing if path.startswith("language/")]
    assert adapters and all(path.endswith(("/lora_a", "/lora_b")) for path in adapters)
    table = published["model.embed_tokens.weight"]
    ours = loaded.leaves["language/embed/table"]
    np.testing.assert_array_equal(ours[:first], table[:first])
    np.testing.assert_allclose(ours[first], table[:first].mean(axis=0), rtol=1e-4, atol=1e-6)


def test_a_model_with_a_published_tokenizer_is_exported_with_its_template(tmp_path):
    """As after training that started from a language folder."""
    write_folder(tmp_path / "source", "qwen2")
    config = folder.load_config(tmp_path / "source", preset("micro"))
    codec = folder.load_codec(tmp_path / "source")
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), FunctionalModel(config).abstract()
    )
    folder.save_model(tmp_path / "model", config, params, codec)
    export_model(tmp_path / "model", tmp_path / "exported")
    inner = tmp_path / "exported/language_model"
    about = json.loads((inner / "config.json").read_text())
    assert (about["eos_token_id"], about["pad_token_id"]) == (codec.eos_id, codec.pad_id)
    assert huggingface.open_codec(inner).template == codec.template
    import_model(tmp_path / "exported", tmp_path / "back")
    assert folder.load_config(tmp_path / "back") == config
