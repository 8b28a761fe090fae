"""Questions about a video. Every wrong option is false there but could be true by its wording.

Wrong events could be in another plan for the same cast ("phantoms"), so a reader of the text alone,
or of a single frame, cannot tell them from what happened. Answers are uniform within a kind, or
nearly so.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tpo_jax.data.moving_shapes import phrases
from tpo_jax.data.moving_shapes.plan import (
    MAX_COUNT,
    possible,
    sample_action,
    sample_event,
    sample_phantoms,
)
from tpo_jax.data.moving_shapes.scene import Scene
from tpo_jax.data.moving_shapes.world import (
    COLOURS,
    DIRECTIONS,
    FORMS,
    TRANSLATIONS,
    TURNING_FORMS,
    Event,
)

QUESTIONS, CLIP_QUESTIONS = 2, 7  # purposes of random streams, see Scene.rng
NUM_OPTIONS = 4
PARTS = ("the first quarter", "the second quarter", "the third quarter", "the last quarter")
ACTION_TRIES = 60
CLEAR_OF_CENTRE = 1 / 16  # of the frame; nearer to the middle a quarter is not said
CLEAR_OF_EVENTS = 1.0  # seconds; nearer to an event it is not said that nothing happens
CLIPS = 2  # a video
CLIP_SECONDS = (3, 10)
NOTHING, RESTS = "nothing", "rests"


@dataclasses.dataclass(frozen=True)
class Question:
    """options: four texts, one of which is the answer; empty for an open question.

    clip: the part of the video, seconds, that is shown with the question; None for all of it.
    """

    kind: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    clip: tuple[float, float] | None = None


def choice(
    rng: np.random.Generator, kind: str, question: str, answer: str, wrong: Sequence[str]
) -> Question:
    """A multiple-choice question with the right answer at a random position."""
    options = [answer, *wrong]
    if len(set(options)) != NUM_OPTIONS:
        raise ValueError(f"question {question!r}: expected 4 different options, got {options}.")
    order = rng.permutation(NUM_OPTIONS)
    return Question(kind, question, answer, tuple(options[i] for i in order))


def video_questions(scene: Scene) -> list[Question]:
    """About thirty questions about one video, one caption among them, and more about its clips."""
    writer = _Writer(scene, scene.events, scene.rng(QUESTIONS))
    seconds = range(1, scene.config.seconds)
    whole = [
        *writer.direction(),
        *writer.order(),
        *writer.before_after(),
        *writer.counting(),
        *writer.action(),
        *writer.attribute(),
        *writer.existence(),
        *writer.moment(),
        *writer.caption(),
        *writer.when(),
        *writer.start(),
        *writer.who(),
        *writer.earlier(),
        *writer.at_time(seconds),
        *writer.doing(seconds),
        *writer.place(seconds),
    ]
    return whole + clip_questions(scene)


def clip_questions(scene: Scene) -> list[Question]:
    """Open questions about short parts of a video in which one event or a few happen.

    Times are those of the whole video. What is asked of a clip is easy to find and still has to be
    put in order or in seconds, which is where learning it can start.
    """
    rng = scene.rng(CLIP_QUESTIONS)
    questions = []
    for start, end in _clips(scene, rng):
        inside = tuple(e for e in scene.events if start <= e.start and e.end <= end)
        writer = _Writer(scene, inside, rng)
        asked = [
            *writer.caption(),
            *writer.when(),
            *writer.start(),
            *writer.who(least=2),
            *writer.earlier(),
        ]
        questions += [dataclasses.replace(q, clip=(start, end)) for q in asked]
    return questions


def _clips(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Windows on half seconds around an event each, which cut no event in two."""
    halves = [float(n) / 2 for n in range(2 * scene.config.seconds + 1)]
    uncut = [
        (start, end)
        for start in halves
        for end in halves
        if CLIP_SECONDS[0] <= end - start <= CLIP_SECONDS[1]
        and all(
            e.end <= start or e.start >= end or start < e.start and e.end < end
            for e in scene.events
        )
    ]
    clips = []
    for i in rng.permutation(len(scene.events))[:CLIPS]:
        event = scene.events[i]
        around = [clip for clip in uncut if clip[0] < event.start and event.end < clip[1]]
        if around:
            clips.append(around[rng.integers(len(around))])
    return list(dict.fromkeys(clips))


def quarter(scene: Scene, actor: int, frame: int) -> str | None:
    """Which quarter of the frame an actor is in: "in the top left"; None where it is not clear."""
    size = scene.config.size
    x, y = (float(v[actor, frame]) / size - 0.5 for v in (scene.states.x, scene.states.y))
    if not all(CLEAR_OF_CENTRE <= abs(v) <= 0.5 for v in (x, y)):
        return None
    return f"in the {'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def _seconds(number: int) -> str:
    return f"{number} second{'' if number == 1 else 's'}"


class _Writer:
    """The facts that the kinds share, of one video or of the events in a part of it."""

    def __init__(self, scene: Scene, events: Sequence[Event], rng: np.random.Generator):
        self.scene, self.actors, self.events, self.rng = scene, scene.actors, events, rng
        self.sentences = [phrases.sentence(e, self.actors) for e in self.events]
        count = Counter(self.sentences)
        self.distinct = list(count)
        self.single = [e for e, s in zip(self.events, self.sentences, strict=True) if count[s] == 1]

    def _pick(self, items: Sequence, count: int) -> list:
        return [items[i] for i in self.rng.permutation(len(items))[:count]]

    def _event_options(self, known: Sequence[str]) -> list[str] | None:
        """Three wrong sentences: of the known events first, phantoms after them."""
        wrong = self._pick(known, NUM_OPTIONS - 1)
        phantoms = sample_phantoms(self.rng, self.actors, self.events, NUM_OPTIONS - 1 - len(wrong))
        if phantoms is None:
            return None
        return wrong + [phrases.sentence(e, self.actors) for e in phantoms]

    def direction(self) -> list[Question]:
        """For actors that move exactly once."""
        moves = [e for e in self.events if e.action == "move"]
        count = Counter(e.actor for e in moves)
        return [
            choice(
                self.rng,
                "direction",
                f"Which way does {self.actors[e.actor].name} move?",
                e.direction,
                [d for d in DIRECTIONS if d != e.direction],
            )
            for e in self._pick([m for m in moves if count[m.actor] == 1], 2)
        ]

    def order(self) -> list[Question]:
        """First and last; not where one event is most of the video."""
        questions = []
        if len(self.distinct) < 3:
            return questions
        for word, answer in (("first", self.sentences[0]), ("last", self.sentences[-1])):
            wrong = self._event_options([s for s in self.distinct if s != answer])
            if wrong:
                questions.append(choice(self.rng, "order", f"What happens {word}?", answer, wrong))
        return questions

    def before_after(self) -> list[Question]:
        """One question each way; the event that is named happens once."""
        questions = []
        for word, step in (("after", 1), ("before", -1)):
            pairs = [
                (i, i + step)
                for i, event in enumerate(self.events)
                if event in self.single and 0 <= i + step < len(self.events)
            ]
            for anchor, at in self._pick(pairs, 1):
                named, answer = self.sentences[anchor], self.sentences[at]
                wrong = self._event_options([s for s in self.distinct if s not in (named, answer)])
                if wrong:
                    text = f"What happens right {word} {named}?"
                    questions.append(choice(self.rng, "before_after", text, answer, wrong))
        return questions

    def counting(self) -> list[Question]:
        """The question that the video was planned around: answers are uniform, zero to three."""
        theme = self.scene.theme
        if theme.scope == "times":
            text = f"How many times does {self.actors[theme.actor].name} {theme.action}?"
        else:
            text = f"How many shapes {theme.action}?"
        wrong = [n for i, n in enumerate(phrases.NUMBERS[: MAX_COUNT + 1]) if i != theme.count]
        return [choice(self.rng, "counting", text, phrases.NUMBERS[theme.count], wrong)]

    def action(self) -> list[Question]:
        """For actors that do one thing and are not pushed about."""
        pushed = {e.other for e in self.events if e.action == "hit"}
        own = {a.index: [e for e in self.events if e.actor == a.index] for a in self.actors}
        able = [
            events[0]
            for i, events in own.items()
            if i not in pushed and len({phrases.sentence(e, self.actors) for e in events}) == 1
        ]
        questions = []
        for event in self._pick(able, 2):
            wrong = self._other_actions(event)
            if wrong:
                text = f"What does {self.actors[event.actor].name} do?"
                answer = phrases.predicate(event, self.actors)
                questions.append(choice(self.rng, "action", text, answer, wrong))
        return questions

    def _other_actions(self, event: Event) -> list[str] | None:
        """Three other predicates for the same actor.

        Entering and the like is also movement: a question offers moves or those, never both,
        whatever the answer.
        """
        answer = phrases.predicate(event, self.actors)
        if event.action in ("turn", "grow", "blink"):
            excluded = ("move",) if self.rng.random() < 0.5 else TRANSLATIONS
        else:
            excluded = TRANSLATIONS if event.action == "move" else ("move",)
        found: dict[str, None] = {}
        for _ in range(ACTION_TRIES):
            if len(found) == NUM_OPTIONS - 1:
                return list(found)
            other = sample_event(self.rng, sample_action(self.rng), self.actors, ())
            other = dataclasses.replace(other, actor=event.actor)
            text = phrases.predicate(other, self.actors)
            fits = other.other != event.actor and possible(other, self.actors)
            if fits and other.action not in excluded and text != answer:
                found.setdefault(text)
        return None

    def attribute(self) -> list[Question]:
        """Who does it: by name and by colour. Wrong options are in the scene as far as possible."""
        if len(self.actors) < NUM_OPTIONS - 1:
            return []
        doers: dict[str, set[int]] = {}
        for event in self.events:
            doers.setdefault(phrases.general_predicate(event), set()).add(event.actor)
        clear = [(p, who.pop()) for p, who in doers.items() if len(who) == 1]
        questions = []
        for index, (what, actor) in enumerate(self._pick(clear, 2)):
            forms = TURNING_FORMS if what == "turns" else FORMS
            if index == 0:
                text, answer = f"Which shape {what}?", self.actors[actor].name
                wrong = self._other_names(answer, forms)
            else:
                text = f"What colour is the shape that {what}?"
                answer = self.actors[actor].colour
                wrong = self._other_colours(answer, forms)
            questions.append(choice(self.rng, "attribute", text, answer, wrong))
        return questions

    def _other_names(self, answer: str, forms: Sequence[str]) -> list[str]:
        present = [a for a in self.actors if a.form in forms and a.name != answer]
        cast = {a.name for a in self.actors}
        used = {a.colour for a in present} | {answer.split()[1]}
        absent = [f"the {c} {self.rng.choice(forms)}" for c in COLOURS if c not in used]
        absent = [name for name in absent if name not in cast]
        names = [*self._pick([a.name for a in present], 3), *self._pick(absent, 3)]
        return names[: NUM_OPTIONS - 1]

    def _other_colours(self, answer: str, forms: Sequence[str]) -> list[str]:
        present = {a.colour for a in self.actors if a.form in forms} - {answer}
        absent = [c for c in COLOURS if c != answer and c not in present]
        ordered = [*self._pick(sorted(present), 3), *self._pick(absent, 3)]
        return ordered[: NUM_OPTIONS - 1]

    def existence(self) -> list[Question]:
        phantoms = sample_phantoms(self.rng, self.actors, self.events, NUM_OPTIONS - 1)
        if phantoms is None:
            return []
        answer = self._pick(self.distinct, 1)[0]
        wrong = [phrases.sentence(e, self.actors) for e in phantoms]
        return [choice(self.rng, "existence", "Which of these happens?", answer, wrong)]

    def moment(self) -> list[Question]:
        """In which quarter; the quarter is drawn first, so that no answer is more likely."""
        part = int(self.rng.integers(len(PARTS)))
        quarter = self.scene.config.seconds / len(PARTS)
        low, high = part * quarter, (part + 1) * quarter
        clear = [
            e
            for e in self.single
            if min(e.end, high) - max(e.start, low) >= 0.7 * (e.end - e.start)
        ]
        return [
            choice(
                self.rng,
                "moment",
                f"In which part of the video does {self._clause(e)}?",
                PARTS[part],
                [p for p in PARTS if p != PARTS[part]],
            )
            for e in self._pick(clear, 1)
        ]

    def caption(self) -> list[Question]:
        """Everything that happens, in order of time."""
        text = str(self.rng.choice(["What happens in the video?", "Describe the video."]))
        return [Question("caption", text, ", then ".join(self.sentences))]

    def when(self) -> list[Question]:
        """Windows in words, on half seconds."""
        return [
            Question(
                "when",
                f"When does {self._clause(e)}?",
                f"from {e.start:g} to {e.end:g} seconds",
            )
            for e in self._pick(self.single, 3)
        ]

    def start(self) -> list[Question]:
        """The first half of `when`: one number, on half seconds."""
        return [
            Question(
                "start",
                f"When does {self.actors[e.actor].name} start to "
                f"{phrases.bare_predicate(e, self.actors)}?",
                f"at {e.start:g} seconds",
            )
            for e in self._pick(self.single, 3)
        ]

    def who(self, least: int = 3) -> list[Question]:
        """Which shape acts first and last, where at least so many different events happen."""
        if len(self.distinct) < least:
            return []
        return [
            Question("who", f"Which shape acts {word}?", self.actors[self.events[at].actor].name)
            for word, at in (("first", 0), ("last", -1))
        ]

    def earlier(self) -> list[Question]:
        """Which of two shapes acts first; a shape that is pushed about is not asked for."""
        pushed = {e.other for e in self.events if e.action == "hit"}
        starts: dict[int, float] = {}
        for event in self.events:
            if event.actor not in pushed:
                starts.setdefault(event.actor, event.start)
        pairs = [(a, b) for a in starts for b in starts if starts[a] < starts[b]]
        questions = []
        for pair in self._pick(pairs, 2):
            first, second = (self.actors[i].name for i in self._pick(pair, 2))
            text = f"Which acts first, {first} or {second}?"
            questions.append(Question("earlier", text, self.actors[pair[0]].name))
        return questions

    def at_time(self, seconds: range) -> list[Question]:
        """What happens at one of the seconds: twice within an event, once where none is near."""
        during = [
            (t, sentence)
            for t in seconds
            for e, sentence in zip(self.events, self.sentences, strict=True)
            if e.start < t < e.end
        ]
        clear = [
            (t, NOTHING)
            for t in seconds
            if all(
                t <= e.start - CLEAR_OF_EVENTS or t >= e.end + CLEAR_OF_EVENTS for e in self.events
            )
        ]
        return [
            Question("at_time", f"What happens at {_seconds(t)}?", answer)
            for t, answer in [*self._pick(during, 2), *self._pick(clear, 1)]
        ]

    def doing(self, seconds: range) -> list[Question]:
        """What one shape does at a second: three times within an event, twice while it rests."""
        active = [(e.actor, t, e) for e in self.events for t in seconds if e.start < t < e.end]
        resting = [
            (actor.index, t, None)
            for actor in self.actors
            for t in seconds
            if quarter(self.scene, actor.index, t * self.scene.config.fps)
            and not any(
                actor.index in (e.actor, e.other)
                and e.start - CLEAR_OF_EVENTS < t < e.end + CLEAR_OF_EVENTS
                for e in self.events
            )
        ]
        return [
            Question(
                "doing",
                f"What does {self.actors[actor].name} do at {_seconds(t)}?",
                phrases.predicate(event, self.actors) if event else RESTS,
            )
            for actor, t, event in [*self._pick(active, 3), *self._pick(resting, 2)]
        ]

    def place(self, seconds: range) -> list[Question]:
        """Open, without options: a single frame is enough, if it is the right one."""
        moments = [("at the start", 0), ("at the end", -1)]
        moments += [(f"at {_seconds(t)}", t * self.scene.config.fps) for t in seconds]
        found = [
            Question("place", f"Where is {actor.name} {when}?", where)
            for actor in self.actors
            for when, frame in moments
            if (where := quarter(self.scene, actor.index, frame))
        ]
        return self._pick(found, 4)

    def _clause(self, event: Event) -> str:
        """As in "the red circle move left", to follow "does"."""
        return f"{self.actors[event.actor].name} {phrases.bare_predicate(event, self.actors)}"
