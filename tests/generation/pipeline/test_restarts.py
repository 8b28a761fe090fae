"""A run of the pair pipeline that was killed goes on, and one that is finished can be extended."""

import tempfile

import memory_bucket
import pytest
from etils import epath
from fake_pipeline import Killed, Speaker, killed_after, manifests, run
from hypothesis import given, settings
from hypothesis import strategies as st

from tpo_jax.data import files
from tpo_jax.generation.pipeline.stages import FILES


@settings(max_examples=60, deadline=None)
@given(kills=st.lists(st.integers(1, 150), min_size=1, max_size=3), cut=st.integers(0, 300))
def test_killed_anywhere_it_goes_on_bit_identically_and_redoes_nothing(whole, kills, cut):
    """Killed after so many records, the last line cut by so many bytes at the last kill."""
    path, _, asked = whole
    speaker, lost = Speaker(), 0
    with tempfile.TemporaryDirectory() as folder:
        for number, kill in enumerate(kills):
            try:
                with killed_after(kill):
                    run(folder, speaker)
            except Killed as killed:
                if number == len(kills) - 1 and cut:
                    file = killed.args[0]
                    data = file.read_bytes()
                    size = len(data.splitlines(keepends=True)[-1])
                    file.write_bytes(data[: len(data) - min(cut, size)])
                    lost = 1
        run(folder, speaker)
        assert manifests(folder) == manifests(path)
    again = speaker.asked - asked
    assert again.total() <= lost and speaker.asked.keys() == asked.keys()


@pytest.mark.parametrize("told", [True, False])
def test_in_a_bucket_only_a_kill_without_a_word_loses_records(whole, monkeypatch, told):
    """SIGTERM has them written before the end; SIGKILL loses those since the last rewrite."""
    path, counts, asked = whole
    memory_bucket.install(monkeypatch)
    monkeypatch.setattr(files, "SECONDS_BETWEEN_REWRITES", 1e9)  # only where a stage is done
    speaker = Speaker()
    with monkeypatch.context() as patch:
        if not told:
            patch.setattr(files.Lines, "close", lambda self: None)
        with pytest.raises(Killed), killed_after(90):
            run("gs://bucket/pairs", speaker)
    there = sum(data.count(b"\n") for name, data in manifests("gs://bucket/pairs").items())
    assert there == 90 if told else 60 < there < 90
    assert run("gs://bucket/pairs", speaker) == counts
    assert manifests("gs://bucket/pairs") == manifests(path)
    again = speaker.asked - asked
    assert 0 <= again.total() <= 90 - there and bool(again) != told
    names = {file.name for file in epath.Path("gs://bucket/pairs").iterdir()}
    assert names == {"settings.json", *FILES.values()}


def test_a_finished_run_asks_nothing_and_more_pairs_go_on(whole, tmp_path):
    path, counts, _ = whole
    few = run(tmp_path, Speaker(), wanted=1)
    assert few["written"] == 1 and few["videos"] == 2
    again = Speaker()
    assert run(tmp_path, again, wanted=1) == few and not again.asked
    assert run(tmp_path, again) == counts
    assert manifests(tmp_path) == manifests(path)
    assert not any("video0" in name or "video1" in name for name in again.asked)
