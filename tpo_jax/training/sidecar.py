"""Reference log-probabilities as data: one file beside the pairs, refused when anything changed.

A sidecar holds float32[n, A] per-token log-probabilities per pair (chosen, and every rejected
answer that it has), together with a fingerprint of everything that can change them: weights,
tokenizer, template, preprocessing, bucket, compute type and attention backend for the whole file,
and one digest per pair of its frames, their times, how they are stored and its token ids. Reading
with another fingerprint or digest fails and names both sides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from tpo_jax.data.rows import Reference
from tpo_jax.data.text import TextCodec
from tpo_jax.errors import MissingFile, UserError
from tpo_jax.models.attention import best_backend
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.parallel.hashes import hash_json, hash_weights

# 1 had digests without the times of frames, and two answers a pair; 2 had digests without how
# frames are stored.
FORMAT_VERSION = 3


class SidecarMismatch(UserError):
    """The sidecar was scored under other conditions than the ones it is read for."""


def hash_row(frames: np.ndarray, stored: str, *tokens: np.ndarray, pad_id: int = 0) -> str:
    """Digest of what one pair shows the model: its frames, their times, their preprocessing before
    the model's own, and its token arrays.

    Padding at the end of a sequence is left out, so that the size of the bucket does not matter.

    Args:
      frames: float64[n, 2], index and seconds of each (`RowBuilder.shown_frames`).
      stored: size and encoding of the frames in their table (`VideoInfo.stored`).
      tokens: int32[..., n] each.
      pad_id: of the tokenizer.
    """
    digest = hashlib.sha256(np.asarray(frames, np.float64).tobytes())
    digest.update(f"{stored};".encode())
    for array in tokens:
        for row in np.asarray(array, np.int32).reshape(-1, array.shape[-1]):
            real = np.flatnonzero(row != pad_id)
            row = row[: real[-1] + 1 if real.size else 0]
            digest.update(f"{len(row)};".encode() + row.tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Everything but the pair itself that changes a reference log-probability.

    weights, model, tokenizer and template are hashes; the rest is readable. A bucket counts by its
    medium and frames: more padding changes nothing.
    """

    weights: str
    model: str
    tokenizer: str
    template: str
    preprocessing: str
    bucket: str
    dtype: str
    attention: str

    @classmethod
    def of(cls, config: ModelConfig, params: Any, codec: TextCodec, frames: int | Iterable[int],
           media: str = "video", contrast: bool = False, platform: str = "",
           context: int = 1) -> Fingerprint:
        """The fingerprint of a model that scores clips in buckets of `frames` frames.

        With `contrast` chosen answers are scored under the manipulated frames as well. `platform`
        is that of the devices that score, "" this process's own, and `context` how many of them
        share a row: both choose the kernel.
        """
        attention = config.language.attention
        if attention == "auto":
            attention = best_backend(
                platform or jax.default_backend(), config.dtype, config.language.head_dim,
                context)
        sizes = sorted({frames} if isinstance(frames, int) else set(frames))
        # What changes speed and memory only, or training only, is no difference.
        language = dataclasses.replace(config.language, dropout=0.0)
        lora = config.lora and dataclasses.replace(config.lora, dropout=0.0)
        same = dataclasses.replace(config, language=language, lora=lora)
        return cls(
            weights=hash_weights(params),
            model=hash_json(_as_first_written(same.to_dict(), attention)),
            tokenizer=hash_json(json.loads(codec.tokenizer.to_str())),
            # How many frames are shown by default is no part of it: `bucket` says how many were.
            # Nor is where generated answers stop: those that are scored are given.
            template=hash_json(dataclasses.replace(codec.template, frames=0, stops=()).to_json()),
            preprocessing=_preprocessing(config),
            bucket=f"{media}, {', '.join(map(str, sizes))} frames"
            f"{', right and manipulated' if contrast else ''}",
            dtype=config.dtype,
            attention=attention)

    def require(self, stored: Fingerprint, where: str) -> None:
        """Raises SidecarMismatch naming every field that differs and both of its values."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(stored)
        different = [key for key in ours if ours[key] != theirs[key]]
        if different:
            lines = [f"  {key}: sidecar {theirs[key]!r}, this run {ours[key]!r}"
                     for key in different]
            raise SidecarMismatch(
                f"{where}: the reference log-probabilities were scored under other conditions:\n"
                + "\n".join(lines)
                + "\nRun `python -m tpo_jax.preferences score` again with this run's reference "
                "model, data and bucket (--frames).")


def _as_first_written(model: dict[str, Any], attention: str) -> dict[str, Any]:
    """A model's dict as the first sidecars hashed it: with the kernel, and with bools for remat."""
    parts = {name: model[name] | {"remat": False} for name in ("vision", "language")}
    parts["language"]["attention"] = attention
    if model["sam2"]:
        parts["sam2"] = model["sam2"] | {"remat": bool(model["sam2"]["remat"])}
    return model | parts


def _preprocessing(config: ModelConfig) -> str:
    vision = config.vision
    if isinstance(vision, TowerConfig):
        return (f"{vision.image_size} pixels, {vision.resize}, (x / 255 - {vision.mean}) / "
                f"{vision.std}, {config.connector}")
    return (f"{vision.image_size} pixels, area, x / 127.5 - 1, "
            f"{config.connector.tokens_per_frame} tokens a frame")


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """Scored pairs in memory.

    Attributes:
      fingerprint: conditions under which all pairs were scored.
      digests: pair id -> hash_row of the pair.
      logps: pair id -> float32[n, A]; row 0 chosen, the others rejected, zero where there is no
        token. With contrast a row more: the chosen answer under the manipulated frames.
    """

    fingerprint: Fingerprint
    digests: Mapping[str, str]
    logps: Mapping[str, np.ndarray]
    path: str = "<memory>"

    def lookup(self, pair_id: str, digest: str, answers: int | None = None) -> np.ndarray:
        """float32[n, A] of one pair; SidecarMismatch when it is absent or shows other tokens.

        Args:
          pair_id: example_id of the pair.
          digest: `hash_row` of it.
          answers: A of the bucket; None gives the length in the file.
        """
        if pair_id not in self.logps:
            raise SidecarMismatch(
                f"{self.path}: pair {pair_id!r} was never scored ({len(self.logps)} pairs are). "
                "Score the same pairs file that is trained on.")
        if self.digests[pair_id] != digest:
            raise SidecarMismatch(
                f"{self.path}: pair {pair_id!r} was scored with frames and tokens "
                f"{self.digests[pair_id]}, but is read with {digest}. The pair, its frames, "
                "their times, the size or encoding that they are stored in or its text changed "
                "since; score again.")
        logps = self.logps[pair_id]
        if answers is None:
            return logps
        padded = np.zeros((len(logps), max(answers, logps.shape[1])), np.float32)
        padded[:, : logps.shape[1]] = logps
        if padded[:, answers:].any():
            raise SidecarMismatch(
                f"{self.path}: pair {pair_id!r} has answers of {np.max(np.nonzero(logps)[1]) + 1} "
                f"tokens, but the bucket has answers = {answers}. Raise buckets.*.answers.")
        return padded[:, :answers]


def write(path: epath.PathLike, sidecar: Sidecar) -> None:
    """Writes a sidecar as .npz (temporary name, then rename)."""
    path = epath.Path(path)
    ids = sorted(sidecar.logps)
    header = {"format_version": FORMAT_VERSION,
              "fingerprint": dataclasses.asdict(sidecar.fingerprint)}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        header=np.asarray(json.dumps(header)),
        ids=np.asarray(ids, dtype=str),
        digests=np.asarray([sidecar.digests[i] for i in ids], dtype=str),
        rows=np.asarray([len(sidecar.logps[i]) for i in ids], np.int32),
        logps=_stack([sidecar.logps[i] for i in ids]))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: several processes may write the same sidecar.
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def _stack(pairs: Sequence[np.ndarray]) -> np.ndarray:
    """float32[pairs, N, A] of float32[n, a] with n <= N and a <= A, zeros at the ends."""
    most, longest = (max((pair.shape[axis] for pair in pairs), default=0) for axis in (0, 1))
    stacked = np.zeros((len(pairs), most, longest), np.float32)
    for out, pair in zip(stacked, pairs, strict=True):
        out[: pair.shape[0], : pair.shape[1]] = pair
    return stacked


def read(path: epath.PathLike, expected: Fingerprint | None = None) -> Sidecar:
    """Reads a sidecar and, when `expected` is given, refuses one scored under other conditions."""
    path = epath.Path(path)
    if not path.exists():
        raise MissingFile(
            f"{path}: no reference sidecar. Write it with `python -m tpo_jax.preferences score`.")
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        header = json.loads(str(file["header"]))
        if header["format_version"] != FORMAT_VERSION:
            raise SidecarMismatch(
                f"{path}: format_version {header['format_version']}, expected {FORMAT_VERSION}. "
                "Score again with this version.")
        ids = [str(i) for i in file["ids"]]
        digests = dict(zip(ids, (str(d) for d in file["digests"]), strict=True))
        rows = zip(ids, file["logps"], file["rows"], strict=True)
        logps = {i: logps[:count] for i, logps, count in rows}
    sidecar = Sidecar(Fingerprint(**header["fingerprint"]), digests, logps, str(path))
    if expected is not None:
        expected.require(sidecar.fingerprint, str(path))
    return sidecar


def merge(parts: Sequence[Sidecar]) -> Sidecar:
    """Joins parts scored under one fingerprint; a pair in two parts is an error."""
    first, *rest = parts
    digests, logps = dict(first.digests), dict(first.logps)
    for part in rest:
        first.fingerprint.require(part.fingerprint, part.path)
        if twice := digests.keys() & part.digests.keys():
            raise UserError(f"{part.path}: pair {min(twice)!r} was already scored in another part")
        digests.update(part.digests)
        logps.update(part.logps)
    return Sidecar(first.fingerprint, digests, logps)


def reference(files: Sequence[epath.PathLike], expected: Fingerprint, answers: int,
              pad_id: int = 0) -> Reference:
    """What the data pipeline asks for reference log-probabilities, from verified sidecars.

    Args:
      files: sidecars, of training and of validation pairs.
      expected: fingerprint of the reference model, i.e. of the weights that training starts from.
      answers: A of the preference bucket.
      pad_id: of the tokenizer.
    """
    merged = merge([read(file, expected) for file in files])

    def look_up(pair_id: str, frames: np.ndarray, stored: str, prefix_tokens: np.ndarray,
                branch_tokens: np.ndarray) -> np.ndarray:
        digest = hash_row(frames, stored, prefix_tokens, branch_tokens, pad_id=pad_id)
        return merged.lookup(pair_id, digest, answers)

    return look_up
