"""Answers questions by rules from what was seen to happen: [(start, end, sentence)], by start."""

from __future__ import annotations

import re

from tpo_jax.data.moving_shapes.questions import NOTHING, PARTS, RESTS

NUMBERS = ("zero", "one", "two", "three")


def answers(question, seen, seconds):
    """All that the rules find, nothing where what is asked about was not seen.

    Args:
      question: has `kind`, `question` and `options`, of a whole video or of a part of it.
      seen: in order of time; of a part of the video, what happens in it.
      seconds: length of the video.
    """
    rule = _RULES.get(question.kind)
    return rule(question, seen, seconds) if rule else []


def third_person(text):
    """ "the red bar hide behind the blue circle" to "the red bar hides behind the blue circle"."""
    words = text.split()
    return " ".join([*words[:3], words[3] + "s", *words[4:]])


def _sentences(seen):
    return [sentence for _, _, sentence in seen]


def _named(question, pattern):
    return re.fullmatch(pattern, question.question).groups()


def _direction(question, seen, seconds):
    (name,) = _named(question, "Which way does (.*) move[?]")
    return [o for o in question.options if f"{name} moves {o}" in _sentences(seen)]


def _order(question, seen, seconds):
    return _sentences(seen)[:1] if "first" in question.question else _sentences(seen)[-1:]


def _before_after(question, seen, seconds):
    word, named = _named(question, "What happens right (after|before) (.*)[?]")
    sentences = _sentences(seen)
    if sentences.count(named) != 1:
        return []
    at = sentences.index(named) + (1 if word == "after" else -1)
    return sentences[at : at + 1] if at >= 0 else []


def _counting(question, seen, seconds):
    verbs = [(" ".join(s.split()[:3]), s.split()[3]) for s in _sentences(seen)]
    if "times" in question.question:
        name, verb = _named(question, "How many times does (.*) (.*)[?]")
        count = verbs.count((name, verb + "s"))
    else:
        (verb,) = _named(question, "How many shapes (.*)[?]")
        count = len({name for name, v in verbs if v == verb + "s"})
    return [NUMBERS[count]]


def _action(question, seen, seconds):
    (name,) = _named(question, "What does (.*) do[?]")
    return [o for o in question.options if f"{name} {o}" in _sentences(seen)]


def _attribute(question, seen, seconds):
    colour = question.question.startswith("What colour")
    (what,) = _named(question, "(?:Which shape|What colour is the shape that) (.*)[?]")
    pattern = what.replace("another shape", "the .*") + "$"
    doers = {s.split()[1] if colour else " ".join(s.split()[:3])
             for s in _sentences(seen) if re.match("the [a-z]+ [a-z]+ " + pattern, s)}  # fmt: skip
    return [o for o in question.options if o in doers]


def _existence(question, seen, seconds):
    return [o for o in question.options if o in _sentences(seen)]


def _windows(seen, clause):
    return [(start, end) for start, end, s in seen if s == third_person(clause)]


def _moment(question, seen, seconds):
    (clause,) = _named(question, "In which part of the video does (.*)[?]")
    quarter = seconds / len(PARTS)
    return [PARTS[int((start + end) / 2 / quarter)] for start, end in _windows(seen, clause)]


def _caption(question, seen, seconds):
    return [", then ".join(_sentences(seen))] if seen else []


def _when(question, seen, seconds):
    (clause,) = _named(question, "When does (.*)[?]")
    return [f"from {start:g} to {end:g} seconds" for start, end in _windows(seen, clause)]


def _start(question, seen, seconds):
    clause = " ".join(_named(question, "When does (.*) start to (.*)[?]"))
    return [f"at {start:g} seconds" for start, _ in _windows(seen, clause)]


def _who(question, seen, seconds):
    sentences = _order(question, seen, seconds)
    return [" ".join(sentence.split()[:3]) for sentence in sentences]


def _earlier(question, seen, seconds):
    names = _named(question, "Which acts first, (.*) or (.*)[?]")
    acting = [name for s in _sentences(seen) for name in names if s.startswith(name)]
    return acting[:1] if len(set(acting)) == 2 else []


def _at_time(question, seen, seconds):
    second = int(_named(question, "What happens at (.*) seconds?[?]")[0])
    return [s for start, end, s in seen if start < second < end] or [NOTHING]


def _doing(question, seen, seconds):
    name, second = _named(question, "What does (.*) do at (.*) seconds?[?]")
    during = [s for start, end, s in seen if start < int(second) < end and s.startswith(name)]
    return [s.removeprefix(f"{name} ") for s in during] or [RESTS]


_RULES = {
    "direction": _direction, "order": _order, "before_after": _before_after,
    "counting": _counting, "action": _action, "attribute": _attribute, "existence": _existence,
    "moment": _moment, "caption": _caption, "when": _when, "start": _start, "who": _who,
    "earlier": _earlier, "at_time": _at_time, "doing": _doing,
}  # fmt: skip
