"""Pre-extracted states of the tokens of questions, for a head that reads those of a text encoder.

They lie in the folder of the clip features (data/clip_features.py), one file a question:

    features.json   {..., "text": {"encoder": "...", "width": 4096, "tokens": 80}}
    text/NAME.npz   "txt" float[n, width], n <= tokens: one row a token, without padding

NAME is `question_name`: questions are told apart by their text, so one that several examples ask,
or a user, has one file. A prepared folder has those of its own questions in a table.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from tpo_jax.data import tables
from tpo_jax.data.problems import Invalid
from tpo_jax.models.config import TextFeaturesConfig
from tpo_jax.models.heads import HEADS

TABLE = "text_features"
ARRAY = "txt"


def question_name(question: str) -> str:
    """20 hexadecimal digits of the text without the space around it."""
    return hashlib.sha256(question.strip().encode()).hexdigest()[:20]


def calls_reader(answer: str) -> bool:
    """Whether an answer calls a head that may read text features."""
    return any(head.reads_text_features and head.marker in answer for head in HEADS.values())


def check(states: np.ndarray, about: TextFeaturesConfig) -> np.ndarray:
    """float32[n, width] of what a file holds; raises Invalid where it does not fit."""
    shape = f"{states.dtype}{list(states.shape)}"
    good = states.ndim == 2 and np.issubdtype(states.dtype, np.floating)
    if not good or not 1 <= len(states) <= about.tokens or states.shape[1] != about.width:
        raise Invalid(
            ARRAY, shape, f"expected float[n, {about.width}] with n of 1 to {about.tokens}, one "
            "row a token", "leave the padding out, or correct text in features.json",
        )  # fmt: skip
    with np.errstate(over="ignore"):  # what float32 cannot hold is found below
        states = np.asarray(states, np.float32)
    bad = np.argwhere(~np.isfinite(states))
    if len(bad):
        row, column = bad[0].tolist()
        raise Invalid(f"{ARRAY}[{row}, {column}]", float(states[row, column]),
                      f"not a finite number, like {len(bad)} of {states.size}",
                      "extract it again")  # fmt: skip
    return states


class Texts:
    """The text features of a prepared folder.

    Args:
      about: their kind.
      table: records, opened.
      places: {video: (its first row, names of its questions in order)}.
    """

    def __init__(self, about: TextFeaturesConfig, table: Sequence[bytes],
                 places: Mapping[str, tuple[int, Sequence[str]]]):  # fmt: skip
        self.about, self._table, self._places = about, table, places

    def has(self, video_id: str, question: str) -> bool:
        return question_name(question) in self._names(video_id)

    def read(self, video_id: str, question: str) -> np.ndarray:
        """float32[n, width] of a question that it has."""
        row = self._places[video_id][0] + self._names(video_id).index(question_name(question))
        return tables.Row(self._table[row]).array(ARRAY, np.float32)

    def _names(self, video_id: str) -> Sequence[str]:
        return self._places.get(video_id, (0, ()))[1]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The text features of one question, with the interface of `Texts`."""

    about: TextFeaturesConfig
    question: str
    states: np.ndarray

    def has(self, video_id: str, question: str) -> bool:
        return question == self.question

    def read(self, video_id: str, question: str) -> np.ndarray:
        """float32[n, width] of the one question."""
        return self.states
