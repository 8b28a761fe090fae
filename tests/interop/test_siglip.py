"""SigLIP 2 of a published folder becomes the eyes of a language folder."""

import json

import numpy as np
import pytest
import safetensors.numpy

from tests.interop.language_folders import write_folder
from tpo_jax import convert
from tpo_jax.interop import folder, siglip
from tpo_jax.interop.export import import_model, largest_difference
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.tensors import lazy
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

VISION = {
    "model_type": "siglip2_vision_model", "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 36, "num_patches": 9, "patch_size": 8,
}  # fmt: skip


def write_siglip2(path):
    """A folder as `transformers` saves Siglip2Model: both halves; returns its tensors."""
    path.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"embeddings.patch_embedding.weight": (24, 192), "embeddings.patch_embedding.bias": 24,
              "embeddings.position_embedding.weight": (9, 24)}  # fmt: skip
    for i in range(3):
        layer = f"encoder.layers.{i}."
        for name in ("q", "k", "v", "out"):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (24, 24)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = 24
        shapes |= {f"{layer}layer_norm{n}.{x}": 24 for n in (1, 2) for x in ("weight", "bias")}
        shapes |= {f"{layer}mlp.fc1.weight": (36, 24), f"{layer}mlp.fc1.bias": 36,
                   f"{layer}mlp.fc2.weight": (24, 36), f"{layer}mlp.fc2.bias": 24}  # fmt: skip
    shapes |= {"post_layernorm.weight": 24, "post_layernorm.bias": 24}
    tower = {f"vision_model.{key}": rng.normal(size=shape).astype(np.float32)
             for key, shape in shapes.items()}  # fmt: skip
    rest = ("text_model.embeddings.token_embedding.weight", "vision_model.head.probe",
            "logit_scale", "logit_bias")  # fmt: skip
    whole = tower | {key: np.ones(2, np.float32) for key in rest}
    safetensors.numpy.save_file(whole, path / "model.safetensors", metadata={"format": "pt"})
    about = {"model_type": "siglip2", "vision_config": VISION, "text_config": {}}
    (path / "config.json").write_text(json.dumps(about))
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3]}')
    return whole


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    tensors = write_siglip2(path / "siglip2")
    write_folder(path / "published", "qwen3")
    import_model(path / "published", path / "qwen3")
    return path, tensors


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    return convert.main()


def fail(*_):
    raise OSError("disk full")


def test_a_model_of_two_parts_lacks_its_connector_alone(parts, monkeypatch, capsys, tmp_path):
    path, tensors = parts
    model = tmp_path / "model"
    given = (f"--source={path / 'siglip2'}", f"--into={path / 'qwen3'}", f"--out={model}")
    assert run(monkeypatch, "import", *given) == 0
    assert 'init_missing=["connector/"]' in capsys.readouterr().out
    config = folder.load_config(model)
    assert (config.vision.kind, config.vision.image_size, config.vision.layer) == (
        "siglip2", 24, -2)  # fmt: skip
    assert config.vision.mean == (0.5, 0.4, 0.3) and config.language.qk_norm
    assert config.connector == preset("siglip2_qwen3_8b").connector
    assert config.visual_offset == folder.load_codec(path / "qwen3").template.visual_offset > 0
    abstract = FunctionalModel(config).abstract()
    missing = folder.check_fits(abstract, model, init_missing=["connector/"])
    assert set(missing) == {p for p in flatten(abstract) if p.startswith("connector/")}

    leaves = folder.open_leaves(model)
    out, back = tmp_path / "out", (f"--model={model}", f"--like={path / 'siglip2'}")
    assert run(monkeypatch, "export", *back, f"--out={out}") == 0
    theirs = safetensors.numpy.load_file(out / "vision" / "model.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(theirs[name], tensor, name)
    about = (path / "siglip2" / "config.json").read_bytes()
    assert (out / "vision" / "config.json").read_bytes() == about
    import_model(out / "language_model", tmp_path / "again")
    again = folder.open_leaves(tmp_path / "again")
    for name, leaf in folder.open_leaves(path / "qwen3").items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(leaves[name]), name)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(again[name]), name)
    assert run(monkeypatch, "import", given[0], f"--into={model}", f"--out={tmp_path / 'x'}") == 2
    assert "has eyes already" in capsys.readouterr().err
    # What is of no part goes out beside them.
    leaves["heads/sam2/network/no_memory"] = lazy(np.arange(3.0, dtype=np.float32))
    trained = {"connector/linear_1/bias": lazy(np.arange(32.0, dtype=np.float32))}
    folder.write_model(model, config.to_dict(), leaves | trained, folder.load_codec(model))
    assert run(monkeypatch, "export", *back, f"--out={out}") == 0
    others = safetensors.numpy.load_file(out / "tpo.safetensors")
    assert {name: list(x) for name, x in others.items()} == {
        "heads/sam2/network/no_memory": [0.0, 1.0, 2.0]
    }
    # All of it comes back.
    whole = ("import", f"--source={out}", f"--out={tmp_path / 'whole'}")
    assert run(monkeypatch, *whole) == 0
    assert "siglip2 and a language model" in capsys.readouterr().out
    assert largest_difference(model, tmp_path / "whole") == 0.0
    assert folder.load_config(tmp_path / "whole") == folder.load_config(model)
    codecs = [folder.load_codec(path) for path in (model, tmp_path / "whole")]
    assert codecs[0].template == codecs[1].template
    assert codecs[0].tokenizer.to_str() == codecs[1].tokenizer.to_str()
    assert run(monkeypatch, *whole, "--adapter=x") == 2
    assert "--adapter: has no meaning for a model of two parts" in capsys.readouterr().err

    files = sorted(out.rglob("*"))
    assert run(monkeypatch, "export", *back, f"--out={out}") == 0
    assert sorted(out.rglob("*")) == files
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text("mine")
    assert run(monkeypatch, "export", *back, f"--out={tmp_path / 'docs'}") == 2
    assert "docs: holds files and is no export" in capsys.readouterr().err
    again = f"--out={path / 'qwen3'}"  # a model folder, of which the other one is made
    assert run(monkeypatch, "import", *given[:2], again) == 2
    assert "which is read for it" in capsys.readouterr().err
    monkeypatch.setattr(siglip, "write_file", fail)  # at the last file
    with pytest.raises(OSError, match="disk full"):
        run(monkeypatch, "export", *back, f"--out={tmp_path / 'new'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "docs", "model", "out", "whole"]


@pytest.mark.parametrize("kind, side", [("siglip", 224), ("siglip2", 256)])
def test_sizes_that_a_config_leaves_out_are_those_of_its_class(kind, side):
    tower = siglip.tower_of({"model_type": kind, "vision_config": {"num_hidden_layers": 11}}, {})
    assert (tower.kind, tower.image_size, tower.patch_size, tower.depth) == (kind, side, 16, 11)
    assert (tower.width, tower.heads, tower.mlp_width) == (768, 12, 3072)
    assert (tower.activation, tower.epsilon) == ("gelu_pytorch_tanh", 1e-6)


def test_the_bilinear_filter_of_siglip_2_is_no_reason_to_refuse_it():
    published = {"do_resize": True, "max_num_patches": 256, "patch_size": 16, "resample": 2}
    where = "processor_config.json: image_processor"
    assert siglip.tower_of({"model_type": "siglip2"}, {where: published}).image_size == 256
    with pytest.raises(FamilyError, match=f"{where}: resample=0: this program"):
        siglip.tower_of({"model_type": "siglip2"}, {where: published | {"resample": 0}})


def test_a_tower_that_is_not_that_of_its_config_json_is_refused(parts, tmp_path, capsys):
    path, tensors = parts
    source, last = tmp_path / "siglip2", "vision_model.encoder.layers.2."
    write_siglip2(source)
    more = {k.replace(last, last.replace("2", "3")): x for k, x in tensors.items() if last in k}
    safetensors.numpy.save_file(tensors | more, source / "model.safetensors")
    given = [f"--source={source}", f"--into={path / 'qwen3'}", f"--out={tmp_path / 'model'}"]
    assert convert.main(["import", *given]) == 2
    printed = capsys.readouterr().err
    assert "encoder.layers.3.layer_norm1.bias is [24], expected none" in printed
    assert not (tmp_path / "model").exists()


def test_both_parts_go_out_in_the_dtype_that_is_asked_for(parts, tmp_path, capsys):
    path, tensors = parts
    model, out = tmp_path / "model", tmp_path / "out"
    given = [f"--source={path / 'siglip2'}", f"--into={path / 'qwen3'}", f"--out={model}"]
    assert convert.main(["import", *given]) == 0
    export = ["export", f"--model={model}", f"--like={path / 'siglip2'}", f"--out={out}"]
    assert convert.main([*export, "--dtype=bfloat16"]) == 0
    for part, entry in (("vision", "torch_dtype"), ("language_model", "dtype")):
        written = safetensors.numpy.load_file(out / part / "model.safetensors")
        assert {x.dtype.name for x in written.values()} == {"bfloat16"}
        assert json.loads((out / part / "config.json").read_text())[entry] == "bfloat16"
    name = "vision_model.post_layernorm.bias"
    vision = safetensors.numpy.load_file(out / "vision/model.safetensors")[name]
    np.testing.assert_array_equal(vision, tensors[name].astype(vision.dtype))
    assert convert.main([*export, "--dtype=checkpoint"]) == 2
    assert "--dtype=checkpoint: has no meaning for a model of two parts" in capsys.readouterr().err
