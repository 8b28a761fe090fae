"""Several commands that each make a part of the pairs, in any order and killed anywhere."""

import contextlib
import tempfile

import pytest
from fake_pipeline import OPTIONS, Killed, Speaker, killed_after, manifests, run, run_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from tpo_jax.generation.pipeline.manifest import ManifestError


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(3)), kills=st.lists(st.integers(1, 80), max_size=2))
def test_shards_in_any_order_and_killed_anywhere_make_the_manifests_of_one_command(
        whole, order, kills):
    path, counts, asked = whole
    speaker = Speaker()
    with tempfile.TemporaryDirectory() as folder:
        for kill in kills:
            with contextlib.suppress(Killed), killed_after(kill):
                run_shard(folder, speaker, order[0], 3, size=2)
        left_over = [run_shard(folder, speaker, shard, 3, size=2) for shard in order]
        assert left_over[0] and left_over[2] == []
        assert run(folder, speaker) == counts
        assert manifests(folder) == manifests(path)
    assert speaker.asked == asked


def test_what_one_command_left_is_gone_on_with_by_shards_and_by_one_again(whole, tmp_path):
    path, counts, asked = whole
    speaker = Speaker()
    assert run(tmp_path, speaker, wanted=1)["videos"] == 2  # the first of two chunks
    assert run_shard(tmp_path, speaker, 0, 2, size=2) == [1] and speaker.asked < asked
    before = speaker.asked.copy()
    assert run_shard(tmp_path, speaker, 1, 4, size=2) == []
    assert not any("video0" in name or "video1" in name for name in speaker.asked - before)
    assert run(tmp_path, speaker) == counts and speaker.asked == asked
    assert manifests(tmp_path) == manifests(path)


def test_a_shard_stops_where_those_before_have_enough(tmp_path):
    first, second = Speaker(), Speaker()
    assert run_shard(tmp_path, first, 0, 2, wanted=1) == []  # the chunks are videos
    assert run_shard(tmp_path, second, 1, 2, wanted=1) == [] and not second.asked
    assert not any("video2" in name for name in first.asked)


def test_shards_with_other_options_are_refused(tmp_path):
    run_shard(tmp_path, Speaker(), 0, 2)
    with pytest.raises(ManifestError, match="(?s)0-of-2: .*captions: option: there 'captions', "
                       "now 'x'.*remove captions.jsonl, .*chunks.jsonl"):
        run(tmp_path, Speaker(), options=OPTIONS | {"captions": {"option": "x"}})
