"""Replies to the prompts of the pair pipeline, as a writer and a judge may word them."""

import pytest

from tpo_jax.generation.pipeline import prompts


@pytest.mark.parametrize("reply, expected", [
    ("Question: Who runs?\nAnswer: The dog.", ("Who runs?", "The dog.")),
    ("**Question:** Who\nruns?\n\n**Answer:** The dog.\n", ("Who runs?", "The dog.")),
    ("None", "topic does not suit"), ("none.", "topic does not suit"),
    ("Who runs?", "unreadable reply"), ("Question: Who?", "unreadable reply"),
    ("Question: Where is <box>?\nAnswer: Here.", "holds '<'"),
])
def test_replies_of_a_writer(reply, expected):
    assert prompts.read_question(reply) == expected


@pytest.mark.parametrize("reply, reason", [
    ("better=2\ncorrect=2\nunclear=no", None),
    ("Better = 2, correct: = both\nunclear=No", None),
    ("better=1\ncorrect=2\nunclear=no", "judge: dis-preferred answer is as good or better"),
    ("better=same\ncorrect=both\nunclear=no", "judge: dis-preferred answer is as good or better"),
    ("better=2\ncorrect=1\nunclear=no", "judge: preferred answer is wrong"),
    ("better=2\ncorrect=none\nunclear=no", "judge: preferred answer is wrong"),
    ("better=2\ncorrect=2\nunclear=yes", "judge: unclear question"),
    ("better=2\ncorrect=2", "judge: unreadable reply"),
    ("", "judge: unreadable reply"),
])
def test_verdicts(reply, reason):
    assert prompts.read_verdict(reply, "2")[1] == reason
