"""What captioners, question writers and judges are asked, and how their replies are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# The eight kinds of question of Temporal Preference Optimization, by their published names, which
# the configs report (`preference.kinds`), as they are put to a writer.
KINDS = {
    "temporal": "when something happens, for how long, or what comes before or after it",
    "action": "what someone or something does",
    "causal": "why something happens or what it leads to",
    "information_extraction": "a fact that the picture holds: a text, a number, a name, a count",
    "descriptive": "what someone, something or the place looks like",
    "summarization": "what happens, taken together",
    "object": "which objects there are, what they are for or what is done with them",
    "spatial": "where things are, in the picture or relative to one another",
}
CAPTION = (
    "Describe in one to three sentences what these pictures show, in their order: who or what is "
    "there, what happens, where, and any text that can be read. Say nothing that cannot be seen.")
_WRITE = """Notes on {what}:
{notes}

Write one question about it and the answer, both from these notes alone. Topic: {kind}.
- There is exactly one right answer, of at most two sentences.
- Someone who watches the whole video without the notes understands what is asked.
- Neither question nor answer mentions notes, pictures or frames.
Reply with two lines, "Question: ..." and "Answer: ...". If the notes do not serve this topic, \
reply "None"."""
_JUDGE = """Notes on {what}:
{notes}

Question: {question}
Answer 1: {first}
Answer 2: {second}

Go by the notes. Reply with three lines:
better=1, 2 or same
correct=1, 2, both or none
unclear=yes if the question contradicts the notes or has several right answers, else no"""
_QUESTION = re.compile(r"^\W*question\W*:\s*(.+?)^\W*answer\W*:\s*(.+)", re.I | re.M | re.S)
_VERDICT = {"better": ("1", "2", "same"), "correct": ("1", "2", "both", "none"),
            "unclear": ("yes", "no")}


def write(kind: str, captions: Sequence[Mapping[str, Any]], is_part: bool) -> str:
    """Asks for a question of a kind about captions of [start, end] segments."""
    return _WRITE.format(what=_what(is_part), notes=_notes(captions), kind=KINDS[kind])


def read_question(reply: str) -> tuple[str, str] | str:
    """(question, answer) of a reply, or why there is none."""
    if re.fullmatch(r"\W*none\W*", reply, re.I):
        return "topic does not suit"
    found = _QUESTION.search(reply)
    if not found:
        return "unreadable reply"
    question, answer = (" ".join(text.strip("*_ \n").split()) for text in found.groups())
    if "<" in question + answer:  # would be read as a call of a head
        return "holds '<'"
    return question, answer


def judge(question: str, first: str, second: str, captions: Sequence[Mapping[str, Any]],
          is_part: bool) -> str:
    """Asks which of two answers is better."""
    return _JUDGE.format(what=_what(is_part), notes=_notes(captions), question=question,
                         first=first, second=second)


def read_verdict(reply: str, chosen: str) -> tuple[dict[str, str], str | None]:
    """The verdict, and why the pair is dropped, None when it is kept.

    Args:
      reply: of the judge.
      chosen: "1" or "2", the number that the preferred answer had.
    """
    verdict = {}
    for name, values in _VERDICT.items():
        said = re.search(rf"\b{name}\W*=\W*({'|'.join(values)})\b", reply, re.I)
        if not said:
            return verdict, "judge: unreadable reply"
        verdict[name] = said[1].lower()
    if verdict["better"] != chosen:
        return verdict, "judge: dis-preferred answer is as good or better"
    if verdict["correct"] not in (chosen, "both"):
        return verdict, "judge: preferred answer is wrong"
    if verdict["unclear"] == "yes":
        return verdict, "judge: unclear question"
    return verdict, None


def _what(is_part: bool) -> str:
    return "a part of a video" if is_part else "a video"


def _notes(captions: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join("[{:.0f}-{:.0f} s] {}".format(*c["segment"], c["caption"]) for c in captions)


def texts() -> list[Any]:
    """All wording, for the fingerprint of a run."""
    return [KINDS, CAPTION, _WRITE, _JUDGE]
