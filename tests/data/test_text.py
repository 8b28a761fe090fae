"""Tokenizer, template and codec."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from fake_dataset import fake_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tpo_jax.data.text import (
    SPECIAL_TOKENS,
    TASK_TOKENS,
    ChatTemplate,
    Slot,
    TextCodec,
    TextError,
    add_task_tokens,
    render_options,
    texts_of,
    time_instruction,
    train_tokenizer,
)
from tpo_jax.models.heads import tokens_of

COLOURS = "red green blue yellow purple orange white cyan".split()
SHAPES = "square triangle circle star bar diamond ring cross".split()
VERBS = "moves turns grows blinks hits enters leaves hides".split()
ALL_HEADS = ("region", "temporal", "mask")


def make_codec(heads=ALL_HEADS) -> TextCodec:
    texts = [f"What does the {c} {s} do first? It {v} left." for c, s, v in
             itertools.product(COLOURS, SHAPES, VERBS)]
    texts += [f"the {c} {s}" for c, s in itertools.product(COLOURS, SHAPES)]
    tokenizer = train_tokenizer(texts, 1000)
    add_task_tokens(tokenizer, heads)
    return TextCodec(tokenizer)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return make_codec()


def test_special_tokens_have_the_first_ids(codec):
    assert [codec.special_ids[t] for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (codec.pad_id, codec.eos_id) == (0, 2)


def test_task_tokens_follow_the_base_vocabulary_in_registry_order(codec):
    tokens = tokens_of(ALL_HEADS)
    first = codec.vocab_size - len(tokens)
    assert codec.task_tokens == {token: first + i for i, token in enumerate(tokens)}
    assert codec.heads == ALL_HEADS
    assert codec.vocab_size <= 1000 + len(tokens) < 1024


def test_adding_heads_later_keeps_ids():
    codec = make_codec(("mask",))
    before = dict(codec.task_tokens)
    add_task_tokens(codec.tokenizer, ("region", "mask"))
    after = TextCodec(codec.tokenizer).task_tokens
    assert before.items() <= after.items()
    assert set(after) == set(tokens_of(("region", "mask")))
    with pytest.raises(ValueError, match="unknown.*depth"):
        add_task_tokens(codec.tokenizer, ("depth",))


def test_words_of_a_closed_vocabulary_are_single_tokens(codec):
    for word in COLOURS + SHAPES + VERBS:
        assert len(codec.encode(" " + word)) == 1, word


def test_tokenizer_of_prepared_texts_covers_them():
    texts = list(texts_of(fake_dataset()))
    assert "a red square" in texts and any("<region>" in text for text in texts)
    codec = TextCodec(train_tokenizer(texts, 1000))
    assert len(codec.encode("a red square")) == 3
    # Markers are cut out before training: no token was learned from their letters.
    assert "region" not in codec.tokenizer.get_vocab()


def test_digits_are_single_tokens(codec):
    assert codec.token_texts(codec.encode("1234")) == ["1", "2", "3", "4"]


def test_training_is_deterministic():
    texts = list(texts_of(fake_dataset()))
    assert train_tokenizer(texts).to_str() == train_tokenizer(texts).to_str()
    with pytest.raises(ValueError, match="vocab_size: 100"):
        train_tokenizer(texts, 100)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_round_trips(codec, text):
    ids = codec.encode(text)
    assert codec.decode(ids) == text
    assert not set(ids) & set(codec.special_ids.values())


@pytest.mark.parametrize("text", ["<eos>", "a <bos><boxes> b", "</video>", "<pad>"])
def test_text_never_becomes_special_tokens(codec, text):
    assert not set(codec.encode(text)) & set(codec.special_ids.values())
    assert codec.decode(codec.encode(text)) == text


def test_branch_tokens_weights_and_slots(codec):
    branch = codec.build_branch("Where is <box> now?", "At <region> and <mask>.")
    names = codec.token_texts(branch.ids)
    assert names[0] == "<user>" and names[branch.answer - 1] == "<assistant>"
    assert names[-1] == "<eos>"
    assert [(s.head, names[s.index]) for s in branch.slots] == [
        ("box", "<track_box>"), ("region", "<boxes>"), ("mask", "<tracking>")]
    # Question and role tokens carry no weight; slot tokens of the answer neither.
    expected = [i >= branch.answer and name not in ("<boxes>", "<tracking>")
                for i, name in enumerate(names)]
    assert branch.weights.tolist() == expected
    assert branch.weights[names.index("<box_begin>")] == 1


def test_prompt_and_prefix_question(codec):
    prompt = codec.build_branch("What?", None)
    assert prompt.answer == len(prompt.ids) and not prompt.weights.any()
    answer = codec.build_branch(None, "the red star")
    assert codec.token_texts(answer.ids) == ["<assistant>", "the", " red", " star", "<eos>"]
    prefix = codec.build_prefix(3, "image", "What?")
    assert codec.token_texts(prefix)[:7] == [
        "<bos>", "<image>", "<pad>", "<pad>", "<pad>", "</image>", "<user>"]


@pytest.mark.parametrize("question, answer, message", [
    ("Q?", "", "q7.answer: empty"),
    ("Q?", "  \n", "q7.answer: empty"),
    ("Q?", "See <regoin>", "q7.answer: marker '<regoin>'"),
    ("Q?", "See <box>", "q7.answer: marker '<box>'"),
    ("Where is <region>?", "a", "q7.question: marker '<region>'"),
    ("Q?", "fine <eos>", "marker '<eos>'"),
])
def test_bad_texts_are_named(codec, question, answer, message):
    with pytest.raises(TextError, match=message):
        codec.build_branch(question, answer, "q7")


def test_marker_of_a_head_without_tokens_is_named():
    with pytest.raises(TextError, match="'<mask>'.*no <tracking>"):
        make_codec(("region",)).build_branch("Q?", "See <mask>")


def test_decode_gives_the_marked_text(codec):
    text = "At <region><mask> then <temporal>, ok."
    ids = codec.build_branch("Q?", text)
    assert codec.decode(ids.ids[ids.answer:]) == text
    assert codec.decode([codec.special_ids["<box_begin>"], codec.eos_id]) == "<box_begin>"
    assert codec.decode(codec.encode_marked("follow <box> now", ("box",), "")[0]) == (
        "follow <box> now")


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(["<region>", "<temporal>", "<mask>", " the", " red", "3é"]),
                      min_size=1, max_size=8))
def test_marked_answers_round_trip(codec, parts):
    text = "".join(parts)
    branch = codec.build_branch("Q?", text)
    assert codec.decode(branch.ids[branch.answer:]) == text
    calls = [part[1:-1] for part in parts if part.startswith("<")]
    assert [slot.head for slot in branch.slots] == calls
    for slot in branch.slots:
        routing, token = TASK_TOKENS[slot.head]
        assert codec.token_texts(branch.ids[slot.index - 1 : slot.index + 1]) == [routing, token]


def test_save_and_load(codec, tmp_path):
    codec.save(tmp_path / "model")
    loaded = TextCodec.load(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "template.json", "tokenizer.json"]
    assert loaded.template == codec.template and loaded.task_tokens == codec.task_tokens
    text = "the red <eos> star 12"
    assert loaded.encode(text) == codec.encode(text)
    beside = TextCodec.load(tmp_path / "model" / "tokenizer.json")
    assert beside.encode(text) == codec.encode(text)
    (tmp_path / "model" / "template.json").unlink()
    with pytest.raises(FileNotFoundError, match="template.json"):
        TextCodec.load(tmp_path / "model")
    alone = TextCodec.load(tmp_path / "model" / "tokenizer.json")
    assert alone.template == ChatTemplate() and alone.encode(text) == codec.encode(text)


def test_pickle_keeps_what_is_not_in_the_tokenizer_file(codec):
    copy = pickle.loads(pickle.dumps(codec))
    assert copy.encode("<eos>") == codec.encode("<eos>") != [codec.eos_id]


def test_template_refuses_other_versions_and_keys():
    good = ChatTemplate().to_json()
    assert ChatTemplate.from_json(good) == ChatTemplate()
    with pytest.raises(ValueError, match="m/template.json: format_version 9"):
        ChatTemplate.from_json(good | {"format_version": 9}, "m/template.json")
    with pytest.raises(ValueError, match="unknown keys.*'usr'"):
        ChatTemplate.from_json(good | {"usr": "x"})


def test_further_stops_are_kept_by_name_and_no_part_of_an_answers_text(codec, tmp_path):
    (mark,) = codec.encode("!")
    stops = ("<bos>", "!")
    TextCodec(codec.tokenizer, ChatTemplate(stops=stops)).save(tmp_path)
    loaded = TextCodec.load(tmp_path)
    assert loaded.template.stops == stops
    assert loaded.stop_ids == (codec.eos_id, codec.special_ids["<bos>"], mark)
    ids = [*codec.encode("a blue star"), mark]
    assert (loaded.decode(ids), codec.decode(ids)) == ("a blue star", "a blue star!")
    assert "stops" not in codec.template.to_json() and codec.stop_ids == (codec.eos_id,)
    with pytest.raises(ValueError, match="template.stops: '<end>' is not in the tokenizer"):
        TextCodec(codec.tokenizer, ChatTemplate(stops=("<end>",)))


def test_template_must_fit_the_tokenizer(codec):
    with pytest.raises(ValueError, match="before_video: 2 tokens, but visual_offset is 3"):
        TextCodec(codec.tokenizer, ChatTemplate(visual_offset=3))
    with pytest.raises(ValueError, match="template.user: '<human>' is not in the tokenizer"):
        TextCodec(codec.tokenizer, ChatTemplate(user="<human>"))


def test_template_may_hold_ordinary_text(codec):
    chat = TextCodec(codec.tokenizer, ChatTemplate(user="<user> the red", assistant="<assistant>"))
    branch = chat.build_branch("star <box>", "ok")
    assert branch.slots == (Slot("box", int(np.flatnonzero(
        branch.ids == codec.special_ids["<track_box>"])[0])),)


def test_options_are_rendered_as_documented():
    assert render_options("Which?", ["a", "b", "c"]) == "Which? Options: a; b; c."


def test_the_time_instruction():
    text = time_instruction([0.0, 1.5, 12.25], 13.0)
    assert text == (
        "The video lasts for 13.00 seconds, and 3 frames are uniformly sampled from it. These "
        "frames are located at 0.00s,1.50s,12.25s.Please answer the following questions related "
        "to this video."
    )


def test_the_sentence_about_times_stands_between_video_and_question(codec):
    template = dataclasses.replace(codec.template, time_instruction=True)
    timed = TextCodec(codec.tokenizer, template)
    ids = timed.time_ids([0.5, 2.0], 3.25)
    prefix = timed.build_prefix(3, "video", "why?", time=ids)
    assert timed.decode(prefix).endswith(time_instruction([0.5, 2.0], 3.25) + "\nwhy?")
    # Any times of as many frames have room, and only where the template says so.
    assert len(ids) <= timed.time_room(2) <= len(timed.time_ids([99999.99] * 2, 99999.99))
    assert codec.time_room(2) == 0 and codec.time_ids([0.5], 1.0) == []


def test_a_template_without_the_younger_entries_keeps_its_file_and_its_fingerprint(codec):
    assert not {"sampling", "frames", "time_instruction"} & codec.template.to_json().keys()
    published = dataclasses.replace(codec.template, sampling="middles", frames=16,
                                    time_instruction=True)
    assert ChatTemplate.from_json(published.to_json()) == published
    with pytest.raises(ValueError, match="template.sampling: 'best'"):
        dataclasses.replace(codec.template, sampling="best")
