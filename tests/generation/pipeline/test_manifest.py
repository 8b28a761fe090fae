"""Manifests of the pair pipeline: refused when damaged, when of other options, when in use."""

import pytest
from fake_pipeline import OPTIONS, Speaker, run

from tpo_jax.generation.pipeline import manifest
from tpo_jax.generation.pipeline.manifest import Folder, FolderBusy, Manifest, ManifestError
from tpo_jax.generation.pipeline.stages import FILES, KEYS


def test_a_changed_option_of_an_earlier_stage_is_refused_by_name(tmp_path):
    run(tmp_path, Speaker(), wanted=1)
    changed = OPTIONS | {"questions": {"option": "other"}}
    with pytest.raises(ManifestError, match="(?s)questions: option: there 'questions', now 'other'"
                       ".*remove questions.jsonl, preferred.jsonl, .*pairs.jsonl"):
        run(tmp_path, Speaker(), options=changed)
    for name in ("preferred", "dispreferred", "filter", "pairs"):
        (tmp_path / FILES[name]).unlink()
    with pytest.raises(ManifestError):  # its own records are still there
        run(tmp_path, Speaker(), options=changed)
    (tmp_path / FILES["questions"]).unlink()
    speaker = Speaker()
    run(tmp_path, speaker, wanted=1, options=changed)
    assert speaker.asked and not any("/part" in name for name in speaker.asked)  # captions stay


def test_a_later_option_may_change_before_its_stage_has_begun(tmp_path):
    run(tmp_path, Speaker(), wanted=1)
    for name in ("filter", "pairs"):
        (tmp_path / FILES[name]).unlink()
    speaker = Speaker()
    run(tmp_path, speaker, wanted=1, options=OPTIONS | {"filter": {"option": "other"}})
    assert all(name.endswith("/judge") for name in speaker.asked)


def test_records_made_from_other_records_are_refused(tmp_path):
    run(tmp_path, Speaker(), wanted=1)
    captions = tmp_path / FILES["captions"]
    text = captions.read_text()
    captions.write_text(text.replace("scene", "scenery"))
    with pytest.raises(ManifestError, match="questions.jsonl: 'video0/written0/0' was made from"):
        run(tmp_path, Speaker())


@pytest.mark.parametrize("text, message", [
    ('{"id": "a"}\nnonsense\n', "m.jsonl:2: not a record with 'id'"),
    ('{"id": "a"}\n{"name": "b"}\n', "m.jsonl:2: not a record with 'id'"),
    ('{"id": "a"}\n{"id": "a"}\n', "m.jsonl:2: id 'a' occurs twice"),
])
def test_a_damaged_manifest_names_the_line(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ManifestError, match=message):
        Manifest(tmp_path / "m.jsonl")


def test_another_process_holds_the_same_records_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest.jax, "process_index", lambda: 1)
    monkeypatch.setattr(manifest, "of_process_0", lambda mine: b'{"id": "a"}\n{"id": "b')
    (tmp_path / "m.jsonl").write_text('{"id": "late"}\n')  # what it sees itself does not matter
    other = Manifest(tmp_path / "m.jsonl")
    other.append({"id": "c"})
    other.sync()
    other.close()
    assert list(other.records) == ["a", "c"]
    assert (tmp_path / "m.jsonl").read_text() == '{"id": "late"}\n'


def test_two_commands_cannot_write_one_folder(tmp_path):
    with Folder(tmp_path, FILES, OPTIONS, KEYS):
        with pytest.raises(FolderBusy, match="another command is writing here"):
            with Folder(tmp_path, FILES, OPTIONS, KEYS):
                pass
    with Folder(tmp_path, FILES, OPTIONS, KEYS):
        pass


def test_a_folder_that_cannot_serve_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"data": "x"}')
    with pytest.raises(ManifestError, match="of another version of `generate`"):
        run(tmp_path, Speaker())
