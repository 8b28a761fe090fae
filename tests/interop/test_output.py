"""What gives way to a folder of weights, and what does not."""

import numpy as np
import pytest

from tpo_jax.interop import output
from tpo_jax.interop.output import EXPORT, MODEL, OutputError
from tpo_jax.interop.tensors import lazy, write_file


def folder(path, name, content=b"", metadata=None):
    path.mkdir()
    if metadata is None:
        (path / name).write_bytes(content)
    else:
        write_file(path / name, {"x": lazy(np.zeros(2, np.float32))}, metadata)
    return path


def test_absent_empty_and_own_folders_are_written_to(tmp_path):
    (tmp_path / "empty").mkdir()
    shard = "model-00001-of-00001.safetensors"
    model = folder(tmp_path / "model", shard, b"", {"format": "tpo_jax"})
    export = folder(
        tmp_path / "export", "model.safetensors", b"", {"format": "pt", "written_by": "tpo_jax"}
    )
    older = folder(tmp_path / "older", "tpo_config.json", b"{}")
    for path in (tmp_path / "absent", tmp_path / "empty", model):
        assert output.check(path, MODEL) == path
    for path in (tmp_path / "absent", tmp_path / "empty", export, older):
        assert output.check(path, EXPORT) == path
    for path, kind in ((export, MODEL), (older, MODEL), (model, EXPORT)):
        with pytest.raises(OutputError, match=f"{path.name}: holds files and is no {kind} that"):
            output.check(path, kind)


@pytest.mark.parametrize("kind", [MODEL, EXPORT])
@pytest.mark.parametrize(
    ("name", "content", "metadata"),
    [
        ("page.md", b"mine", None),
        ("config.json", b'{"model_type": "qwen2"}', None),
        ("model.safetensors", b"", {"format": "pt"}),  # as everybody publishes
        ("model.safetensors", b"cut", None),
    ],
)
def test_what_somebody_else_keeps_there_is_refused(kind, name, content, metadata, tmp_path):
    theirs = folder(tmp_path / "theirs", name, content, metadata)
    before = (theirs / name).read_bytes()
    with pytest.raises(OutputError, match="theirs: holds files.*choose another folder, or remove"):
        with output.replacing(theirs, kind):
            raise AssertionError("not reached")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert (theirs / name).read_bytes() == before
    with pytest.raises(OutputError, match="a file; the .* is a folder"):
        output.check(theirs / name, kind)


def test_what_is_read_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "source")
    (tmp_path / "link2").symlink_to(tmp_path / "target")
    inner = tmp_path / "source/inner/x"
    for out in ("source", "source/", "source/new", "./link", "link/x", ".", "..", inner):
        with pytest.raises(OutputError, match="is, holds or lies in source, which is read"):
            output.check(out, EXPORT, None, "source")
    assert output.check("source2", EXPORT, "source") == tmp_path / "source2"
    assert output.check("link2", EXPORT) == tmp_path / "target"  # the folder, not the link to it
    bucket = "gs://bucket/source"
    with pytest.raises(OutputError, match="is, holds or lies in gs://bucket/source,"):
        output.check(f"{bucket}/out", EXPORT, bucket)


def test_neighbours_of_a_folder_are_left_alone(tmp_path):
    """What a kill left has names of its own; somebody's model.old or model.tmp is no leftover."""
    mine = [folder(tmp_path / name, "x.txt") for name in ("model.old", "model.tmp")]
    (tmp_path / "model.tpo_tmp").mkdir()  # a kill while it was written,
    (tmp_path / "model.tpo_old").mkdir()  # or while it took its place
    for text in ("first", "second"):
        with output.replacing(tmp_path / "model", MODEL) as temporary:
            write_file(temporary / "x.safetensors", {}, output.MODEL_METADATA)
            (temporary / "x.txt").write_text(text)
    assert (tmp_path / "model/x.txt").read_text() == "second"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model", *mine]
