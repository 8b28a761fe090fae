"""Questions: true, clear, balanced, and not to be answered from their text."""

import collections
import re

import numpy as np
import pytest
from answerer import NUMBERS, answers, third_person
from observer import observed

from tpo_jax.data.moving_shapes import WorldConfig, render, simulate, simulate_image
from tpo_jax.data.moving_shapes.image_questions import image_questions
from tpo_jax.data.moving_shapes.questions import NUM_OPTIONS, choice, video_questions

CONFIG = WorldConfig()
KINDS = {
    *("direction", "order", "before_after", "counting", "action", "attribute"),
    *("existence", "moment", "caption", "when", "start", "who", "earlier"),
    *("at_time", "doing", "place"),
}
OPEN = {"caption", "when", "start", "who", "earlier", "at_time", "doing", "place"}


@pytest.fixture(scope="module")
def videos():
    scenes = [simulate((5, 0, 0, i), CONFIG) for i in range(400)]
    return [(scene, video_questions(scene)) for scene in scenes]


@pytest.fixture(scope="module")
def images():
    scenes = [simulate_image((5, 0, 1, i), CONFIG) for i in range(150)]
    return [(scene, image_questions(scene)) for scene in scenes]


@pytest.fixture(scope="module")
def watched(videos):
    """Some videos and their clips, with their questions and what is seen happening in them."""
    found = []
    for scene, questions in videos[:60]:
        seen = observed(scene, render(scene).visible)
        for clip in {question.clip: None for question in questions}:
            start, end = clip or (0.0, scene.config.seconds)
            inside = [event for event in seen if start <= event[0] and event[1] <= end]
            found.append((scene, [q for q in questions if q.clip == clip], inside))
    return found


def _of_kind(videos, kind):
    return [q for _, qs in videos for q in qs if q.kind == kind]


def test_exactly_the_answer_is_true(watched):
    judged = collections.Counter()
    for scene, questions, seen in watched:
        for question in questions:
            if question.options:
                found = answers(question, seen, CONFIG.seconds)
                assert found == [question.answer], (scene.seed, question)
                judged[question.kind] += 1
    assert set(judged) == KINDS - OPEN
    assert min(judged.values()) >= 20


def test_captions_list_everything_in_order(watched):
    for _, questions, seen in watched:
        (caption,) = (q for q in questions if q.kind == "caption")
        assert caption.answer.split(", then ") == [s for _, _, s in seen]


def test_when_gives_the_window(watched):
    for _, questions, seen in watched:
        for question in (q for q in questions if q.kind == "when"):
            clause = re.fullmatch("When does (.*)[?]", question.question)[1]
            window = re.fullmatch("from (.*) to (.*) seconds", question.answer).groups()
            ((start, end, _),) = [s for s in seen if s[2] == third_person(clause)]
            first, last = map(float, window)
            assert start == first and last - 0.4 <= end <= last


def test_start_is_the_first_half_second_of_the_event(watched):
    for _, questions, seen in watched:
        for question in (q for q in questions if q.kind == "start"):
            name, verb = re.fullmatch("When does (.*) start to (.*)[?]", question.question).groups()
            (start,) = [s for s, _, sentence in seen if sentence == third_person(f"{name} {verb}")]
            assert question.answer == f"at {start:g} seconds"


def test_who_acts_first_and_last(watched):
    for _, questions, seen in watched:
        for question in (q for q in questions if q.kind == "who"):
            which = {"first": 0, "last": -1}[question.question.removesuffix("?").split()[-1]]
            assert seen[which][2].startswith(question.answer)


def test_earlier_is_the_one_of_two_shapes_that_acts_first(watched):
    is_first_named = []
    for _, questions, seen in watched:
        for question in (q for q in questions if q.kind == "earlier"):
            names = re.fullmatch("Which acts first, (.*) or (.*)[?]", question.question).groups()
            starts = [min(s for s, _, text in seen if text.startswith(name)) for name in names]
            assert starts[0] != starts[1]
            assert question.answer == names[int(starts[1] < starts[0])]
            is_first_named.append(question.answer == names[0])
    assert 0.4 < np.mean(is_first_named) < 0.6 and len(is_first_named) > 60


def test_at_time_names_what_happens_then_or_nothing(watched):
    answers = collections.Counter()
    for _, questions, seen in watched:
        for question in (q for q in questions if q.kind == "at_time"):
            second = int(re.fullmatch("What happens at (.*) seconds?[?]", question.question)[1])
            during = [sentence for start, end, sentence in seen if start < second < end]
            near = [s for start, end, s in seen if start - 0.9 < second < end + 0.9]
            assert question.answer in during or (question.answer == "nothing" and not near)
            answers["nothing" if question.answer == "nothing" else "event"] += 1
    assert 0.1 < answers["nothing"] / answers.total() < 0.4


def test_doing_is_what_the_shape_does_then_or_rests(watched):
    answers = collections.Counter()
    for _, questions, seen in watched:
        for question in (q for q in questions if q.kind == "doing"):
            found = re.fullmatch("What does (.*) do at (.*) seconds?[?]", question.question)
            name, second = found[1], int(found[2])
            during = [s for start, end, s in seen if start < second < end]
            if question.answer == "rests":
                assert not any(sentence.startswith(name) for sentence in during)
            else:
                assert f"{name} {question.answer}" in during
            answers[question.answer == "rests"] += 1
    assert 0.3 < answers[True] / answers.total() < 0.5


def test_place_is_the_quarter_of_the_frame_that_holds_the_shape(videos, images):
    asked = collections.Counter()
    for scene, questions in (*videos, *images):
        names = {a.name: a.index for a in scene.actors}
        for question in (q for q in questions if q.kind in ("place", "image_place")):
            name = re.search("is (the [a-z]+ [a-z]+)|picture is (.*)[?]", question.question)
            actor = names[name[1] or name[2]]
            second = re.search("at ([0-9]+) second", question.question)
            frame = -1 if "at the end" in question.question else 0
            frame = int(second[1]) * scene.config.fps if second else frame
            x, y = scene.states.x[actor, frame], scene.states.y[actor, frame]
            assert ("left" in question.answer) == (x < 32)
            assert ("top" in question.answer) == (y < 32)
            asked[question.answer] += 1
    assert len(asked) == 4 and max(asked.values()) < 0.3 * sum(asked.values())


def test_four_different_options_and_the_answer_among_them(videos, images):
    for _, questions in (*videos, *images):
        for question in questions:
            if question.options:
                assert len(set(question.options)) == NUM_OPTIONS
                assert question.answer in question.options


def test_many_questions_of_every_kind(videos):
    per_video = [len(questions) for _, questions in videos]
    assert np.mean(per_video) >= 40 and max(per_video) <= 65
    count = collections.Counter(q.kind for _, questions in videos for q in questions)
    assert set(count) == KINDS
    for kind in KINDS:
        assert count[kind] >= 0.5 * len(videos), kind


def test_a_clip_is_short_cuts_no_event_and_is_asked_about_openly(videos):
    clips = 0
    for scene, questions in videos:
        for start, end in {q.clip for q in questions} - {None}:
            clips += 1
            assert 0 <= start and end <= scene.config.seconds and 3 <= end - start <= 10
            inside = [start < e.start and e.end < end for e in scene.events]
            outside = [e.end <= start or end <= e.start for e in scene.events]
            assert any(inside) and np.all(np.logical_xor(inside, outside))
    assert clips >= 1.5 * len(videos)
    assert not any(q.options for _, questions in videos for q in questions if q.clip)


def test_positions_and_closed_answers_are_balanced(videos):
    for kind in KINDS - OPEN:
        questions = _of_kind(videos, kind)
        places = np.bincount([q.options.index(q.answer) for q in questions], minlength=4)
        assert places.max() / len(questions) <= 0.25 + 3.5 * np.sqrt(0.1875 / len(questions)), kind
        if kind in ("direction", "counting", "moment"):
            answers = collections.Counter(q.answer for q in questions)
            assert max(answers.values()) / len(questions) <= 0.36, (kind, answers)


def _cues(question, option):
    """What a reader of the text may go by."""
    words = option.split()
    others = [o.split() for o in question.options if o != option]
    yield from (("word", question.kind, w) for w in words)
    yield "option", question.kind, option
    asked = set(re.findall("[a-z]+", question.question)) - {"the", "shape", "shapes"}
    yield "shared", question.kind, len(asked & set(words))
    yield "same actor", question.kind, sum(o[:3] == words[:3] for o in others)
    if len(words) > 3:
        yield "same verb", question.kind, words[3], sum(o[3:4] == words[3:4] for o in others)


def test_a_reader_of_the_text_is_near_chance(videos):
    """Log-odds of every cue from two thirds of the videos, tested on the rest."""
    half = 2 * len(videos) // 3
    right, wrong = collections.Counter(), collections.Counter()
    for _, questions in videos[:half]:
        for q in questions:
            for option in q.options:
                (right if option == q.answer else wrong).update(_cues(q, option))
    hits = collections.defaultdict(list)
    for _, questions in videos[half:]:
        for q in questions:
            scores = [
                sum(np.log((right[c] + 1) / (wrong[c] / 3 + 1)) for c in _cues(q, option))
                for option in q.options
            ]
            if scores:
                hits[q.kind].append(q.options[int(np.argmax(scores))] == q.answer)
    assert np.mean(np.concatenate(list(hits.values()))) <= 0.33
    for kind, found in hits.items():
        assert np.mean(found) <= 0.25 + 4 * np.sqrt(0.1875 / len(found)), kind


def test_few_words_and_short_texts(videos, images):
    texts = [t for _, questions in (*videos, *images) for q in questions
             for t in (q.question, q.answer, *q.options)]  # fmt: skip
    words = {w for text in texts for w in re.findall("[a-z]+|[0-9]+", text.lower())}
    assert len(words) < 150
    assert max(len(q.question.split()) for _, qs in videos for q in qs) <= 16


def test_image_questions_are_true(images):
    for scene, questions in images:
        names = {a.name: a for a in scene.actors}
        kinds = {q.kind for q in questions}
        assert {"image_counting", "image_caption", "image_existence"} <= kinds
        for q in questions:
            if q.kind == "image_counting":
                assert (
                    NUMBERS.index(q.answer) == len(names) if len(names) < 4 else q.answer == "four"
                )
            elif q.kind == "image_existence":
                assert [o for o in q.options if o in names] == [q.answer]
            elif q.kind == "image_position":
                _check_position(scene, names, q)
            elif q.kind == "image_attribute" and q.question.startswith("What colour"):
                form = q.question.split()[-1].rstrip("?")
                assert [a.colour for a in scene.actors if a.form == form] == [q.answer]


def _check_position(scene, names, question):
    first = names[re.fullmatch("Where is (.*)[?]", question.question)[1]]
    where, second = re.fullmatch("(left of|right of|above|below) (.*)", question.answer).groups()
    x, y = scene.states.x[:, 0], scene.states.y[:, 0]
    dx, dy = (v[first.index] - v[names[second].index] for v in (x, y))
    assert {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[where] > 0
    assert (abs(dx) > abs(dy)) == (where in ("left of", "right of"))


def test_equal_options_are_refused():
    with pytest.raises(ValueError, match="4 different options"):
        choice(np.random.default_rng(0), "order", "What?", "a", ["a", "b", "c"])
