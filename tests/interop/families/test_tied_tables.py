"""Tied models whose files hold the output table as well: one table here, two equal ones on disk."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from tests.interop.families.configs import LLAVA_ONEVISION_TIED, LLAVA_VIDEO, VIDEO_LLAVA
from tests.interop.families.published_folder import same_tensors, sized, write_published
from tests.interop.language_folders import write_folder
from tpo_jax import convert
from tpo_jax.interop import folder
from tpo_jax.interop.families.folder import export_family, import_family
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.mapping import MappingError
from tpo_jax.interop.tensors import lazy, write_file

TIED_TEXT = {"text_config": VIDEO_LLAVA["text_config"] | {"tie_word_embeddings": True}}
# config.json, and the names of the table and of its stored copy.
TIED = {
    "llava_onevision": (
        LLAVA_ONEVISION_TIED, "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    ),
    "llava_qwen": (
        LLAVA_VIDEO | {"tie_word_embeddings": True}, "model.embed_tokens.weight", "lm_head.weight",
    ),
    "video_llava": (
        VIDEO_LLAVA | TIED_TEXT, "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    ),
}  # fmt: skip


def add_head(path, table, head, change=None):
    """Writes the output table beside the one of tokens; `change` is made in it. Returns it."""
    tensors = {name: np.asarray(x) for name, x in read_tensors(path).items()}
    tensors[head] = tensors[table].copy()
    if change is not None:
        change(tensors[head])
    lazily = {name: lazy(tensor) for name, tensor in tensors.items()}
    write_file(path / "model.safetensors", lazily, {"format": "pt"})
    return tensors[head]


def one_number(head):
    head[7, 3] += 1


@pytest.fixture(params=TIED)
def published(request, tmp_path):
    data, table, head = TIED[request.param]
    (tmp_path / "source").mkdir()
    write_published(tmp_path / "source", sized(data))
    return tmp_path / "source", table, head


def test_both_ends_of_a_trained_table_go_out(published, tmp_path):
    source, table, head = published
    add_head(source, table, head)
    lines = import_family(source, tmp_path / "model")
    assert not any("carried" in line for line in lines)
    assert "language/lm_head/kernel" not in folder.open_leaves(tmp_path / "model")
    export_family(tmp_path / "model", tmp_path / "same", source)
    same_tensors(source, tmp_path / "same")

    config, params, codec = folder.load_model(tmp_path / "model")
    params["language"]["embed"]["table"][:320] += 1  # as training changes it
    folder.save_model(tmp_path / "trained", config, params, codec)
    export_family(tmp_path / "trained", tmp_path / "out", source)
    theirs, ours = read_tensors(source), read_tensors(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    np.testing.assert_array_equal(np.asarray(ours[table]), np.asarray(theirs[table]) + 1)
    assert np.asarray(ours[head]).tobytes() == np.asarray(ours[table]).tobytes()
    import_family(tmp_path / "out", tmp_path / "back")  # they agree again


def test_another_output_table_is_refused(published, tmp_path, capsys):
    source, table, head = published
    add_head(source, table, head, one_number)
    assert convert.main(["import", f"--source={source}", f"--out={tmp_path / 'model'}"]) == 2
    wanted = f"tensors '{table}' and '{head}' differ, first in row 7, .* tie_word_embeddings=false"
    assert re.search(wanted, capsys.readouterr().err)
    assert not (tmp_path / "model").exists()
    leaves = folder.open_leaves(source)["language/embed/table"]  # as training reads it
    assert leaves[8:20].shape == (12, 32)
    with pytest.raises(MappingError, match="first in row 7"):
        leaves[5:9, 2:4]


def test_a_table_of_another_size_or_dtype_is_refused(published, tmp_path):
    source, table, head = published
    tensors = {name: np.asarray(x) for name, x in read_tensors(source).items()}
    for other, kinds in (
        (tensors[table][:300], r"are bfloat16\[320, 32\] and bfloat16\[300, 32\]"),
        (tensors[table].astype(np.float32), r"are bfloat16\[320, 32\] and float32\[320, 32\]"),
    ):
        lazily = {name: lazy(tensor) for name, tensor in (tensors | {head: other}).items()}
        write_file(source / "model.safetensors", lazily, {"format": "pt"})
        with pytest.raises(MappingError, match=kinds):
            import_family(source, tmp_path / "model")


@pytest.mark.parametrize("name", ["llava_onevision", "llava_qwen"])
def test_two_tables_go_in_and_out_where_config_json_says_so(name, tmp_path):
    data, table, head = TIED[name]
    (tmp_path / "source").mkdir()
    write_published(tmp_path / "source", sized(data))
    change = add_head(tmp_path / "source", table, head, one_number)
    untied = sized(data) | {"tie_word_embeddings": False}
    (tmp_path / "source/config.json").write_text(json.dumps(untied))
    import_family(tmp_path / "source", tmp_path / "model")
    kernel = np.asarray(folder.open_leaves(tmp_path / "model")["language/lm_head/kernel"])
    np.testing.assert_array_equal(kernel[:, :320], change.T)
    export_family(tmp_path / "model", tmp_path / "out", tmp_path / "source")
    assert np.asarray(read_tensors(tmp_path / "out")[head]).tobytes() == change.tobytes()


def test_a_language_model_with_another_output_table_is_refused(tmp_path, capsys):
    source, model = tmp_path / "source", tmp_path / "model"
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    write_folder(source, "qwen2", files=1, dtype=ml_dtypes.bfloat16)
    (source / "model.safetensors.index.json").unlink()
    (source / "model-00001-of-00001.safetensors").rename(source / "model.safetensors")
    add_head(source, table, head)
    command = ["import", f"--source={source}", f"--out={model}"]
    assert convert.main(command) == 0
    assert "left out: lm_head.weight" in capsys.readouterr().out
    add_head(source, table, head, one_number)
    assert convert.main(command) == 2
    assert f"'{table}' and '{head}' differ, first in row 7" in capsys.readouterr().err
