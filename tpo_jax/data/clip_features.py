"""Pre-extracted features of videos: one file a video, whoever computed them.

    features.json   {"format_version": 1, "encoder": "...", "clip_seconds": 2.0, "width": 2818}
    NAME.npz        "features" float[N, width]: row i is about the i-th clip_seconds of it

(and of questions, if there is "text": data/text_features.py)
NAME is the path of the video below its media folder, without the suffix. That is how features of
QVHighlights and its relatives are published, so that a downloaded folder needs features.json alone.
A head reads the numbers as they stand here. Whatever does not fit is a FeatureError, which names
file, field, value, what was expected and the fix; nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import uuid
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from tpo_jax.data import text_features, validation
from tpo_jax.data.media import safe_name, without_suffix
from tpo_jax.data.problems import Invalid, Problem, differs
from tpo_jax.data.records import RecordError, prepared_features, read_settings
from tpo_jax.data.row_plans import RowPlan
from tpo_jax.errors import UserError
from tpo_jax.models.config import ClipFeaturesConfig, TextFeaturesConfig

FORMAT_VERSION = 1
ABOUT = "features.json"
_KEYS = ("format_version", "encoder", "clip_seconds", "width")
_EXTRACT = "extract them with `python -m tpo_jax.prepare features`"


class FeatureError(UserError):
    """Features that cannot be used; `problem` says which and why."""

    def __init__(self, problem: Problem):
        super().__init__(str(problem))
        self.problem = problem

    def __reduce__(self):
        return FeatureError, (self.problem,)


class FeatureStore:
    """The features of many videos, and of questions about them where `text` is not None.

    Args:
      path: a folder with a features.json, local or gs://.

    Raises:
      FeatureError: there is none, or it cannot be used.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.about, self.text = _read_about(self.path / ABOUT)

    @classmethod
    def create(
        cls, path: epath.PathLike, about: ClipFeaturesConfig,
        text: TextFeaturesConfig | None = None,
    ) -> FeatureStore:
        """A store to write into, new or begun before; one of other features is refused.

        Text features may join clip features that were there before.
        """
        file = epath.Path(path) / ABOUT
        if file.exists():
            cls(path).require(about, None, "choose another --out")
        if not file.exists() or (text is not None and cls(path).text is None):
            data = {"format_version": FORMAT_VERSION} | dataclasses.asdict(about)
            data |= {"text": dataclasses.asdict(text)} if text else {}
            _write_whole(file, json.dumps(data).encode() + b"\n")
        store = cls(path)
        store.require(about, text, "choose another --out")
        return store

    def require(
        self, about: ClipFeaturesConfig | None, text: TextFeaturesConfig | None, fix: str
    ) -> None:
        """Raises FeatureError unless these are features of that kind; None: of any, or none."""
        difference = None if about is None else differs(self.about, about)
        if difference is None and text is not None:
            if self.text is None:
                difference = ("text", None, "the folder has no text features")
            elif found := differs(self.text, text):
                difference = (f"text.{found[0]}", *found[1:])
        if difference is not None:
            raise FeatureError(Invalid(*difference, fix).at(str(self.path / ABOUT), ""))

    def file(self, video_id: str) -> epath.Path:
        """Where the features of a video are, or would be."""
        return self.path / f"{without_suffix(safe_name(video_id, 'video'))}.npz"

    def file_of(self, video: pathlib.Path) -> epath.Path:
        """The same of a media file anywhere: the longest end of its path that is a name here."""
        parts = video.absolute().parts[1:]
        names = [without_suffix("/".join(parts[first:])) for first in range(len(parts))]
        files = [self.path / f"{name}.npz" for name in names]
        return next((file for file in files if file.exists()), files[-1])

    def read(self, file: epath.Path, duration: float) -> np.ndarray:
        """float32[N, width] of a file, checked against the duration of its video in seconds."""
        try:
            return check(_load(file), self.about, duration)
        except Invalid as invalid:
            raise FeatureError(invalid.at(str(file), "")) from invalid

    def write(self, video_id: str, features: np.ndarray) -> None:
        """float32[N, width], under a temporary name first."""
        _save(self.file(video_id), features=np.asarray(features, np.float32))

    def text_file(self, question: str) -> epath.Path:
        """Where the features of a question are, or would be."""
        return self.path / "text" / f"{text_features.question_name(question)}.npz"

    def read_text(self, question: str) -> np.ndarray:
        """float32[n, width] of a question."""
        file = self.text_file(question)
        try:
            if not file.is_file():
                raise Invalid("", None, f"there are no text features of {question!r}",
                              "extract them (docs/heads.md)")  # fmt: skip
            return text_features.check(_load(file, text_features.ARRAY), self.text)
        except Invalid as invalid:
            raise FeatureError(invalid.at(str(file), "")) from invalid

    def write_text(self, question: str, states: np.ndarray) -> None:
        """float32[n, width], likewise."""
        _save(self.text_file(question), txt=np.asarray(states, np.float32))


def check(features: np.ndarray, about: ClipFeaturesConfig, duration: float) -> np.ndarray:
    """float32[N, width] of what a file holds; raises Invalid where it does not fit.

    The last clip may be cut off, left out, or padded to a whole one, so N is within one of
    duration / clip_seconds.
    """
    shape = f"{features.dtype}{list(features.shape)}"
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not len(features):
        raise Invalid("features", shape, "expected float[N, width], one row a clip", "correct it")
    if features.shape[1] != about.width:
        raise Invalid(
            "features", shape, f"expected {about.width} numbers a clip, as {ABOUT} says",
            f"correct width there, or {_EXTRACT} again",
        )  # fmt: skip
    expected = duration / about.clip_seconds
    if abs(len(features) - expected) > 1 + 1e-6:
        raise Invalid(
            "features", shape,
            f"{len(features)} clips of {about.clip_seconds:g} s, expected {expected:.1f} in "
            f"{duration:.3f} s of video",
            f"correct clip_seconds in {ABOUT}, or {_EXTRACT} again",
        )  # fmt: skip
    with np.errstate(over="ignore"):  # what float32 cannot hold is found below
        features = np.asarray(features, np.float32)
    bad = np.argwhere(~np.isfinite(features))
    if len(bad):
        row, column = bad[0].tolist()
        raise Invalid(
            f"features[{row}, {column}]", float(features[row, column]),
            f"not a finite number, like {len(bad)} of {features.size}", f"{_EXTRACT} again",
        )  # fmt: skip
    return features


def resample(
    features: np.ndarray, clip_seconds: float, start: float, end: float, parts: int
) -> np.ndarray:
    """What each of some equal parts of [start, end] is about.

    A part within one clip gets its features as they are; one that touches several gets their mean,
    each as heavy as the time that they share. What comes after the last clip belongs to it.

    Args:
      features: float32[N, D], clip i from i * clip_seconds on.
      start, end: seconds, start < end.

    Returns:
      float32[parts, D].
    """
    edges = np.linspace(start, end, parts + 1)
    begins = np.arange(len(features)) * clip_seconds
    ends = begins + clip_seconds
    ends[-1] = max(ends[-1], end)
    shared = np.minimum(edges[1:, None], ends) - np.maximum(edges[:-1, None], begins)
    shared = np.where(shared > 1e-6 * clip_seconds, shared, 0.0)  # edges are rounded
    out = np.empty((parts, features.shape[1]), np.float32)
    for part, share in zip(out, shared, strict=True):
        touched = np.flatnonzero(share)
        weights = share[touched] / np.sum(share)
        part[:] = weights.astype(np.float32) @ features[touched]
    return out


@dataclasses.dataclass(frozen=True)
class RowFeatures:
    """The clip features of rows, for a model with a head that reads them.

    Attributes:
      about: what the head reads.
      tasks: that such heads answer.
    """

    about: ClipFeaturesConfig
    tasks: frozenset[str]

    def check(self, plan: RowPlan) -> bool:
        """Whether the row has features.

        Images have none, and so may rows whose answers are given and call no head that reads them.

        Raises:
          Invalid: the folder has other features, or none where they are read.
        """
        have = plan.dataset.clip_features_config
        again = "prepare it again with --features=FOLDER"
        if plan.dataset.video_info(plan.video_id).media == "image":
            return False
        if have is None:
            markers = [f"<{task}>" for task in sorted(self.tasks)]
            if any(b.answer is None or any(m in b.answer for m in markers) for b in plan.branches):
                reason = f"the folder has none, but a head of the model reads {self.about}"
                raise Invalid("clip_features", None, reason, again)
            return False
        if difference := differs(have, self.about):
            field, value, reason = difference
            fix = f"{again} of that encoder, or train the head on these (config.clip_features=True)"
            raise Invalid(f"clip_features.{field}", value, reason, fix)
        return True

    def of_row(self, plan: RowPlan, frames: int) -> np.ndarray:
        """float32[frames, width]: frame i of n stands for the i-th n-th of the row's clip."""
        features = plan.dataset.clip_features(plan.video_id)
        return resample(features, self.about.clip_seconds, plan.start, plan.end, frames)


def config_of_folders(paths: Iterable[str], kind: str = "clip_features") -> Any:
    """What prepared folders have of "clip_features" or "text_features"; those without do not count.

    Raises:
      RecordError: none has any, or two have different ones.
    """
    found: dict[str, Any] = {}
    paths = list(paths)
    for path in paths:
        about = prepared_features(read_settings(epath.Path(path)), kind)
        if about is not None:
            found[path] = about
    if not found:
        raise RecordError(
            f"config.{kind}=True: none of {paths} has {kind.replace('_', ' ')}; prepare the folder "
            "with --features=FOLDER"
        )
    first, *others = found
    for other in others:
        if difference := differs(found[other], found[first]):
            field, value, _ = difference
            raise RecordError(
                f"{other}/prepared.json: {kind}.{field}: {value!r}, but {first} has "
                f"{getattr(found[first], field)!r}; prepare both with the same features"
            )
    return found[first]


def _read_about(file: epath.Path) -> tuple[ClipFeaturesConfig, TextFeaturesConfig | None]:
    try:
        if not file.is_file():
            raise Invalid("", None, "the file does not exist, so this is no folder of features",
                          f"correct the path, {_EXTRACT}, or write it (docs/heads.md)")  # fmt: skip
        data = json.loads(file.read_text("utf-8"))
        validation.check_keys(data, ("text",), _KEYS)
        if data["format_version"] != FORMAT_VERSION:
            raise Invalid("format_version", data["format_version"], f"expected {FORMAT_VERSION}",
                          f"{_EXTRACT} again")  # fmt: skip
        if not isinstance(data["width"], int) or not data["width"] >= 1:
            raise Invalid("width", data["width"], "expected the numbers a clip", "correct it")
        about = ClipFeaturesConfig(
            data["width"],
            validation.check_number("clip_seconds", data["clip_seconds"], 1e-3, 1e6, "seconds"),
            validation.check_text("encoder", data["encoder"]),
        )
        return about, _read_text_about(data["text"]) if "text" in data else None
    except Invalid as invalid:
        raise FeatureError(invalid.at(str(file), "")) from invalid
    except ValueError as error:
        problem = Invalid("", None, f"not JSON ({error})", "correct it").at(str(file), "")
        raise FeatureError(problem) from error


def _read_text_about(data: Any) -> TextFeaturesConfig:
    """Raises Invalid, which names a field of "text"."""
    if not isinstance(data, dict) or data.keys() != {"encoder", "width", "tokens"}:
        raise Invalid("text", data, "expected encoder, width and tokens", "correct it")
    for name in ("width", "tokens"):
        if not isinstance(data[name], int) or not data[name] >= 1:
            raise Invalid(f"text.{name}", data[name], "expected 1 or more", "correct it")
    encoder = validation.check_text("text.encoder", data["encoder"])
    return TextFeaturesConfig(data["width"], data["tokens"], encoder)


def _load(file: epath.Path, name: str = "features") -> np.ndarray:
    """One array of an npz file; raises Invalid."""
    again = f"{_EXTRACT} again" if name == "features" else "write it again (docs/heads.md)"
    if not file.is_file():
        raise Invalid("", None, "there are no features of this video", _EXTRACT)
    data = io.BytesIO(file.read_bytes())
    if not zipfile.is_zipfile(data):
        raise Invalid("", None, "not an npz file", again)
    try:
        with np.load(data, allow_pickle=False) as arrays:
            if name not in arrays:
                raise Invalid(name, None, f"missing; the file has {arrays.files}",
                              f"name the array {name}")  # fmt: skip
            return arrays[name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, Invalid):
            raise
        raise Invalid(name, None, f"cannot be read ({error})", again) from error


def _save(file: epath.Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _write_whole(file, buffer.getvalue())


def _write_whole(file: epath.Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: several processes may write the same file.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
