"""The TFDS tables of a prepared folder, written and read without TensorFlow.

Records are `tf.train.Example` protos in ArrayRecord files with group size 1, next to the metadata
that `tfds.builder_from_directory(DIR/clips/1.0.0).as_data_source("all")` needs. Training reads the
protos directly: that is the same bytes without the feature machinery per record.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

if TYPE_CHECKING:  # tables are read and written without it
    from tensorflow_datasets.core.features import FeaturesDict

TABLE_VERSION = "1.0.0"
SPLIT = "records"  # TFDS reserves the name "all" for the union of the splits of a table
ENCODINGS = ("raw", "jpeg")
JPEG_QUALITY = 92

Column = str | int | np.ndarray | Sequence[str] | Sequence[bytes]


def writer(path: pathlib.Path, table: str) -> array_record_module.ArrayRecordWriter:
    """An ArrayRecord writer with random access.

    Clips are not compressed: JPEG gains nothing, and raw frames are for reading at a quarter of the
    time; examples (text, run lengths) are.
    """
    compression = "zstd:1" if table == "examples" else "uncompressed"
    return array_record_module.ArrayRecordWriter(str(path), f"group_size:1,{compression}")


def serialize(columns: Mapping[str, Column]) -> bytes:
    """One `tf.train.Example`; an absent list is an empty column.

    str and list[str] become bytes, int becomes int64, a float array of one axis becomes floats, any
    other array its shape and raw bytes; list[bytes] holds encoded pictures.
    """
    proto = tf_example_pb2.Example()
    feature = proto.features.feature
    for name, value in columns.items():
        if isinstance(value, str):
            feature[name].bytes_list.value.append(value.encode())
        elif isinstance(value, int):
            feature[name].int64_list.value.append(value)
        elif isinstance(value, np.ndarray) and (value.dtype == np.uint8 or value.ndim > 1):
            feature[f"{name}/shape"].int64_list.value.extend(value.shape)
            feature[f"{name}/value"].bytes_list.value.append(value.tobytes())
        elif isinstance(value, np.ndarray):
            feature[name].float_list.value.extend(value.tolist())
        else:
            feature[name].bytes_list.value.extend(
                item.encode() if isinstance(item, str) else item for item in value
            )
    return proto.SerializeToString(deterministic=True)


class Row:
    """Typed access to the columns of one serialised record."""

    def __init__(self, record: bytes):
        self._feature = tf_example_pb2.Example.FromString(record).features.feature

    def text(self, name: str) -> str:
        return self._feature[name].bytes_list.value[0].decode()

    def integer(self, name: str) -> int:
        return self._feature[name].int64_list.value[0]

    def floats(self, name: str) -> np.ndarray:
        """float32[n]"""
        return np.asarray(self._feature[name].float_list.value, np.float32)

    def pictures(self, name: str) -> Sequence[bytes]:
        return self._feature[name].bytes_list.value

    def array(self, name: str, dtype: type = np.uint8) -> np.ndarray:
        """dtype[...]: read-only, in the shape it was written with."""
        shape = tuple(self._feature[f"{name}/shape"].int64_list.value)
        data = self._feature[f"{name}/value"].bytes_list.value[0]
        return np.frombuffer(data, dtype).reshape(shape)


def shard_name(table: str, index: int, count: int) -> str:
    return f"{table}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


def is_shard(file_name: str) -> bool:
    return ".array_record-" in file_name


def write_metadata(folder: pathlib.Path, table: str, encoding: str, shards: Sequence[int]) -> None:
    """Writes features.json and dataset_info.json beside shards that are already there.

    Args:
      folder: DIR/<table>/1.0.0.
      table: "clips", "examples", "clip_features" or "text_features".
      encoding: "raw" or "jpeg", decides the type of the clips' `frames`.
      shards: the number of records in each shard, in order.
    """
    _features(table, encoding).save_config(str(folder))
    size = sum(
        (folder / shard_name(table, i, len(shards))).stat().st_size for i in range(len(shards))
    )
    split = {
        "name": SPLIT,
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "shardLengths": [str(n) for n in shards],
        "numBytes": str(size),
    }
    info = {
        "name": table,
        "version": TABLE_VERSION,
        "fileFormat": "array_record",
        "description": f"tpo_jax {table}",
        "splits": [split],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", "utf-8")


@dataclasses.dataclass(frozen=True)
class _Shard:
    """array_record's FileInstruction: naming the length spares opening every file at start."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_table(folder: epath.Path) -> array_record_data_source.ArrayRecordDataSource:
    """Random access to the records (bytes) of DIR/<table>; files are opened on first use.

    ArrayRecord reads gs:// by itself, with a client of its own (0.8.6 does).
    """
    folder = folder / TABLE_VERSION
    info = json.loads((folder / "dataset_info.json").read_text("utf-8"))
    lengths = [int(n) for n in info["splits"][0]["shardLengths"]]
    return array_record_data_source.ArrayRecordDataSource(
        [
            _Shard(str(folder / shard_name(info["name"], i, len(lengths))), 0, n, n)
            for i, n in enumerate(lengths)
        ]
    )


def _features(table: str, encoding: str) -> FeaturesDict:
    """The TFDS feature spec of a table; only metadata, never used to encode a record."""
    from tensorflow_datasets import features as tf

    floats = tf.Tensor(shape=(None, None), dtype=np.float32, encoding=tf.Encoding.BYTES)
    if table == "examples":
        columns = {name: tf.Text() for name in ("example_id", "video_id", "media", "task")}
        columns |= {name: tf.Text() for name in ("source", "json")}
        columns |= {n: tf.Sequence(tf.Text()) for n in ("questions", "answers", "clip_ids")}
        return tf.FeaturesDict(columns)
    if table == "clip_features":
        return tf.FeaturesDict({"video_id": tf.Text(), "features": floats})
    if table == "text_features":
        return tf.FeaturesDict({"video_id": tf.Text(), "question": tf.Text(), "txt": floats})
    columns = {name: tf.Text() for name in ("clip_id", "video_id", "media", "encoding")}
    columns["chunk"] = tf.Scalar(dtype=np.int64)
    columns["timestamps"] = tf.Tensor(shape=(None,), dtype=np.float32)
    if encoding == "raw":
        columns["frames"] = tf.Tensor(
            shape=(None, None, None, 3), dtype=np.uint8, encoding=tf.Encoding.BYTES
        )
    else:
        columns["frames"] = tf.Sequence(tf.Image(shape=(None, None, 3), encoding_format="jpeg"))
    return tf.FeaturesDict(columns)


def encode_jpeg(frame: np.ndarray) -> bytes:
    """JPEG bytes of uint8[h, w, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> np.ndarray:
    """uint8[h, w, 3]"""
    with Image.open(io.BytesIO(data)) as image:
        # convert() copies also what is RGB already.
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
