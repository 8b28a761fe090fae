"""Export to PyTorch and back: same numbers there, same bits here."""

import shutil

import jax
import numpy as np
import pytest

from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.interop import export
from tpo_jax.interop.folder import load_model, save_model
from tpo_jax.interop.mapping import MappingError, Row, export_leaves, import_leaves
from tpo_jax.interop.output import OutputError
from tpo_jax.models import presets
from tpo_jax.models.video_language import FunctionalModel

HEADS = ("region", "temporal", "mask")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A micro model with all heads; perturbed, so that no norm or bias is the identity."""
    tokenizer = train_tokenizer(["what happens here? nothing", "the red circle moves left"], 300)
    add_task_tokens(tokenizer, HEADS)
    codec = TextCodec(tokenizer)
    config = presets.preset("micro", HEADS, codec.task_tokens)
    params = jax.jit(FunctionalModel(config).init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(x) + 0.05 * rng.normal(size=x.shape), params)
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, config, params, codec)
    return folder


def test_import_of_export_is_bit_identical(model_folder, tmp_path):
    export.export_model(model_folder, tmp_path / "exported")
    export.import_model(tmp_path / "exported", tmp_path / "back")
    assert export.largest_difference(model_folder, tmp_path / "back") == 0.0
    assert load_model(tmp_path / "back")[0] == load_model(model_folder)[0]
    question = "the red circle <box>"
    codecs = [load_model(folder)[2] for folder in (model_folder, tmp_path / "back")]
    ids = [codec.build_branch(question, "moves <mask>").ids for codec in codecs]
    np.testing.assert_array_equal(*ids)


def test_a_head_that_the_pytorch_file_does_not_run_is_refused(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "RUNTIME_HEADS", ("region", "mask"))
    with pytest.raises(export.ExportFolderError, match=r"\['temporal'\] cannot be exported"):
        export.export_model(model_folder, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_what_was_there(model_folder, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    export.export_model(model_folder, tmp_path / "exported")
    before = sorted(path.name for path in (tmp_path / "exported").iterdir())
    monkeypatch.setattr(export, "write_file", fail)  # after the language model
    with pytest.raises(type(error)):
        export.export_model(model_folder, tmp_path / "exported")
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    monkeypatch.undo()
    (tmp_path / "exported/stale.txt").write_text("old")
    export.export_model(model_folder, tmp_path / "exported")  # an export gives way to another
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == before


def test_an_export_takes_the_place_of_nothing_else(model_folder, tmp_path):
    before = sorted(model_folder.iterdir())
    with pytest.raises(OutputError, match="is, holds or lies in .*, which is read for it"):
        export.export_model(model_folder, model_folder)
    with pytest.raises(OutputError, match="is, holds or lies in"):
        export.export_model(model_folder, model_folder / "exported")
    copied = tmp_path / "model"  # a model folder, though not the one that is exported
    shutil.copytree(model_folder, copied)
    with pytest.raises(OutputError, match="holds files and is no export that this program wrote"):
        export.export_model(model_folder, copied)
    assert sorted(model_folder.iterdir()) == before
    assert sorted(p.name for p in copied.iterdir()) == [p.name for p in before]
    export.export_model(model_folder, tmp_path / "exported")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text("mine")
    with pytest.raises(OutputError, match="no model folder that this program wrote"):
        export.import_model(tmp_path / "exported", docs)
    with pytest.raises(OutputError, match="is, holds or lies in"):
        export.import_model(tmp_path / "exported", tmp_path / "exported")
    assert (tmp_path / "exported/tpo_config.json").exists() and (docs / "page.md").exists()


def test_a_tensor_that_no_leaf_uses_is_refused(model_folder, tmp_path):
    import safetensors.numpy

    export.export_model(model_folder, tmp_path / "exported")
    file = tmp_path / "exported/language_model/model.safetensors"
    tensors = safetensors.numpy.load_file(file) | {"model.stray": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(MappingError, match="model.stray"):
        export.import_model(tmp_path / "exported", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(export.ExportFolderError, match="tpo_config.json"):
        export.import_model(tmp_path, tmp_path / "back")


def test_mapping_names_every_leaf_and_tensor_it_cannot_place():
    rows = [Row("a", "A"), Row("n", "N"), Row("stack", "layers.{layer}.w", transpose=True)]
    number = np.float32(2.0)
    leaves = {"a": np.arange(3.0), "n": number, "stack": np.arange(12.0).reshape(2, 2, 3)}
    tensors = export_leaves(rows, leaves)
    assert tensors["N"].shape == () and import_leaves(rows, tensors)["n"] == number
    assert tensors["layers.1.w"].shape == (3, 2)
    np.testing.assert_array_equal(import_leaves(rows, tensors)["stack"], leaves["stack"])
    with pytest.raises(MappingError, match="extra"):
        export_leaves(rows, leaves | {"extra": np.zeros(1)})
    with pytest.raises(MappingError, match="'A' is missing"):
        import_leaves(rows, {k: v for k, v in tensors.items() if k != "A"})
    with pytest.raises(MappingError, match=r"layers \[0, 2\]"):
        import_leaves(rows, {k.replace(".1.", ".2."): v for k, v in tensors.items()})


@pytest.mark.parity
def test_pytorch_computes_the_same(model_folder, tmp_path):
    pytest.importorskip("torch")
    from tpo_jax.interop import check

    export.export_model(model_folder, tmp_path / "exported")
    differences = check.compare(model_folder, tmp_path / "exported")
    assert {part.split("/")[0] for part in differences} == {
        "vision", "connector", "language", "logits", "heads"
    }  # fmt: skip
    assert max(differences.values()) < 2e-4, differences


@pytest.mark.parity
def test_transformers_tokenises_and_templates_the_same(model_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    export.export_model(model_folder, tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported/language_model")
    codec = load_model(model_folder)[2]
    text = "the red circle moves left 42 times"
    assert tokenizer.encode(text, add_special_tokens=False) == codec.encode(text)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert ids == [codec.special_ids["<bos>"], *codec.build_branch(text, None).ids]
