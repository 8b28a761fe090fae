"""Arrays that are read when they are needed, and safetensors files that are read and written so.

A conversion is a chain of `LazyArray`s from files of one layout to files of another. Nothing is
read before a part of it is asked for, and then only the bytes of that part: peak memory is one
tensor, and a process of many that wants its shard of a leaf reads no other.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from tpo_jax.errors import UserError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
# Reading and transposing go in pieces of this size, so that a tensor is in memory once.
BLOCK_BYTES = 64 * 2**20
# Runs below a page are not worth a read of their own.
_PAGE = 4096

Index = tuple[slice, ...]
Box = tuple[tuple[int, int], ...]  # (start, stop) of every axis


class TensorFileError(UserError):
    """A file that is no safetensors file, or of which a part is missing; the message names it."""


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of which parts are read on demand. np.asarray reads all of it.

    Attributes:
      shape, dtype: of the whole.
      read: function of one slice per axis (start and stop given, step 1) -> that part.
      unit: entries along axis 0 that are best read at once.
      inner: the axis, -1 or -2, along which a file has the entries side by side.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    unit: int = 1
    inner: int = -1

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        given = index if isinstance(index, tuple) else (index,)
        given += (slice(None),) * (len(self.shape) - len(given))
        return self.read(
            tuple(slice(*s.indices(n)[:2]) for s, n in zip(given, self.shape, strict=True))
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # what was read is nobody else's
        whole = self[()]
        return whole if dtype is None else whole.astype(dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """The array in consecutive C-ordered parts."""
        if not self.shape:
            yield np.ascontiguousarray(self[()])
            return
        for start in range(0, self.shape[0], self.unit):
            yield np.ascontiguousarray(self[start : start + self.unit])


def lazy(array: Any) -> LazyArray:
    """A LazyArray of anything that has shape and dtype and can be sliced."""
    if isinstance(array, LazyArray):
        return array
    array = np.asarray(array)
    # A number without axes would come out as a scalar, which is no array.
    return LazyArray(array.shape, array.dtype, lambda i: np.asarray(array[i]), _rows(array))


def transposed(array: LazyArray) -> LazyArray:
    """[..., A, B] -> [..., B, A]."""
    *lead, a, b = array.shape
    unit = array.unit if lead else b

    def read(index: Index) -> np.ndarray:
        *outer, columns, rows = index
        lengths = [s.stop - s.start for s in index]
        out = np.empty(lengths, array.dtype)
        step = max(1, BLOCK_BYTES // max(1, math.prod(lengths[:-1]) * array.dtype.itemsize))
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            at = slice(start - rows.start, part.stop - rows.start)
            out[..., at] = np.swapaxes(array[(*outer, part, columns)], -1, -2)
        return out

    return LazyArray((*lead, b, a), array.dtype, read, unit, inner=-3 - array.inner)


def stacked(parts: Sequence[LazyArray]) -> LazyArray:
    """[L, ...] of L arrays of one shape and dtype."""
    first = parts[0]

    def read(index: Index) -> np.ndarray:
        layers, rest = index[0], index[1:]
        if layers.stop - layers.start == 1:
            return parts[layers.start][rest][None]
        out = np.empty([s.stop - s.start for s in index], first.dtype)
        for layer in range(layers.start, layers.stop):
            out[layer - layers.start] = parts[layer][rest]
        return out

    return LazyArray((len(parts), *first.shape), first.dtype, read, inner=first.inner)


def entry(array: LazyArray, number: int) -> LazyArray:
    """array[number], the inverse of `stacked`."""

    def read(index: Index) -> np.ndarray:
        return array[(slice(number, number + 1), *index)][0]

    one = LazyArray(array.shape[1:], array.dtype, read, inner=array.inner)
    return dataclasses.replace(one, unit=_rows(one))


def led(array: LazyArray, count: int) -> LazyArray:
    """[...] -> [1, ..., 1, ...] with `count` axes more."""

    def read(index: Index) -> np.ndarray:
        inner = array[index[count:]]
        return inner.reshape(*(s.stop - s.start for s in index[:count]), *inner.shape)

    if not count:
        return array
    return LazyArray((1,) * count + array.shape, array.dtype, read, inner=array.inner)


def unled(array: LazyArray, count: int) -> LazyArray:
    """The inverse of `led`."""

    def read(index: Index) -> np.ndarray:
        return array[(slice(0, 1),) * count + index].reshape([s.stop - s.start for s in index])

    if not count:
        return array
    without = LazyArray(array.shape[count:], array.dtype, read, inner=array.inner)
    return dataclasses.replace(without, unit=_rows(without))


def resized(array: LazyArray, rows: int) -> LazyArray:
    """The first `rows` along axis 0; what is beyond the array is zero."""
    have = array.shape[0]

    def read(index: Index) -> np.ndarray:
        first, rest = index[0], index[1:]
        if first.stop <= have:
            return array[index]
        out = np.zeros([s.stop - s.start for s in index], array.dtype)
        if first.start < have:
            out[: have - first.start] = array[(slice(first.start, have), *rest)]
        return out

    unit = array.unit if array.unit < have else max(rows, 1)
    return LazyArray((rows, *array.shape[1:]), array.dtype, read, unit, array.inner)


def read_parts(array: LazyArray, boxes: Collection[Box], dtype: Any) -> dict[Box, np.ndarray]:
    """{box: that part of the array}, cast; different parts, such as those of a process's devices.

    Of a part that is narrow along the rows of a file whole rows are read (`_fill`). Such parts are
    cut from one reading of all that lie in the same rows.
    """
    parts: dict[Box, np.ndarray] = {}
    rows: dict[tuple[Box, Box], list[Box]] = {}
    for box in boxes:
        if _is_narrow(array, box):
            at = len(box) + array.inner
            rows.setdefault((box[:at], box[at + 1 :]), []).append(box)
        else:
            parts[box] = array[_slices(box)].astype(dtype, copy=False)
    for group in rows.values():
        parts |= _cut_rows(array, group, dtype)
    return parts


def _cut_rows(array: LazyArray, boxes: Sequence[Box], dtype: Any) -> dict[Box, np.ndarray]:
    """Parts that differ along `array.inner` alone. Stacks are read entry by entry, so that no more
    than one is in memory twice."""
    at = len(boxes[0]) + array.inner
    first, last = min(box[at][0] for box in boxes), max(box[at][1] for box in boxes)
    span = [*boxes[0][:at], (first, last), *boxes[0][at + 1 :]]
    low, high = span[0]
    parts = {box: np.empty([stop - start for start, stop in box], dtype) for box in boxes}
    step = 1 if len(span) > 2 else high - low
    for start in range(low, high, step):
        block = array[_slices(((start, start + step), *span[1:]))]
        for box, part in parts.items():
            cut = [slice(None)] * len(span)
            cut[at] = slice(box[at][0] - first, box[at][1] - first)
            part[start - low : start - low + step] = block[tuple(cut)]
    return parts


def _is_narrow(array: LazyArray, box: Box) -> bool:
    """Whether `_fill` reads whole rows of a file for a part."""
    if len(box) < 2:
        return False
    start, stop = box[array.inner]
    return stop - start < array.shape[array.inner] and (stop - start) * array.dtype.itemsize < _PAGE


def _slices(box: Sequence[tuple[int, int]]) -> Index:
    return tuple(slice(*ends) for ends in box)


def mean(array: LazyArray, axis: int, count: int) -> np.ndarray:
    """float32 mean of the first `count` rows (axis 0) or columns (axis 1) of a matrix, which is
    read block by block: as NumPy's, they are summed one after the other.
    """
    # Across the rows of a file; a transposed matrix has its bytes the other way.
    cut = 0 if array.unit < array.shape[0] else 1
    shape = [count if n == axis else size for n, size in enumerate(array.shape)]
    step = max(1, BLOCK_BYTES // (shape[1 - cut] * array.dtype.itemsize))
    total = np.zeros(shape[1 - axis], np.float32)
    for start in range(0, shape[cut], step):
        index = [slice(0, size) for size in shape]
        index[cut] = slice(start, min(start + step, shape[cut]))
        rows = np.moveaxis(array[tuple(index)], axis, 0).astype(np.float32, order="C")
        rows[0] += total[index[1 - axis]]
        total[index[1 - axis]] = rows.sum(axis=0)
    return total / count


def _rows(array: Any) -> int:
    """Entries along axis 0 in a block."""
    if not array.shape or not array.shape[0]:
        return 1
    row = max(1, math.prod(array.shape[1:]) * array.dtype.itemsize)
    return max(1, min(array.shape[0], BLOCK_BYTES // row))


def read_file(path: epath.PathLike) -> dict[str, LazyArray]:
    """{name: array} of a safetensors file; only its header is read.

    Raises:
      TensorFileError: not a safetensors file, cut off, or with a dtype that we do not have.
    """
    path = epath.Path(path)
    header, _, length, end = _read_header(path)
    size = path.stat().length
    if size != 8 + length + end:
        raise TensorFileError(
            f"{path}: not a safetensors file (its header describes {8 + length + end} bytes, it "
            f"has {size}); copy it again"
        )
    arrays = {}
    for name, value in header.items():
        if value["dtype"] not in DTYPES:
            raise TensorFileError(
                f"{path}: {name} has dtype {value['dtype']}; this program reads {sorted(DTYPES)}"
            )
        start = 8 + length + value["data_offsets"][0]
        arrays[name] = _file_array(path, start, tuple(value["shape"]), DTYPES[value["dtype"]])
    return arrays


def read_metadata(path: epath.PathLike) -> dict[str, str]:
    """What the writer of a safetensors file says of it.

    Raises:
      TensorFileError: not a safetensors file.
    """
    return _read_header(epath.Path(path))[1]


def _read_header(path: epath.Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """({name: dtype, shape, data_offsets}, metadata, bytes of the header, bytes of the data)."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length))
            metadata = dict(header.pop("__metadata__", None) or {})
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (
            ValueError, OverflowError, MemoryError, LookupError, AttributeError, TypeError,
        ) as error:  # fmt: skip
            raise TensorFileError(
                f"{path}: not a safetensors file ({error}); copy it again"
            ) from error
    return header, metadata, length, end


def _file_array(path: epath.Path, start: int, shape: tuple[int, ...], dtype: Any) -> LazyArray:
    dtype = np.dtype(dtype)

    def read(index: Index) -> np.ndarray:
        out = np.empty([s.stop - s.start for s in index], dtype)
        if out.size:
            with path.open("rb") as stream:
                _fill(out, stream, start, shape, index)
        return out

    array = LazyArray(shape, dtype, read)
    return dataclasses.replace(array, unit=_rows(array))


def _fill(
    out: np.ndarray, stream: BinaryIO, start: int, shape: tuple[int, ...], index: Index
) -> None:
    """Reads one slice per axis of an array that starts at byte `start` into `out`."""
    row = math.prod(shape[1:]) * out.dtype.itemsize
    start += (index[0].start * row) if index else 0
    if all(out.shape[axis] == shape[axis] for axis in range(1, len(shape))):
        _fill_run(out, stream, start)
    elif len(shape) == 2 and out.shape[1] * out.dtype.itemsize < _PAGE:
        step = max(1, BLOCK_BYTES // row)
        for at in range(0, out.shape[0], step):
            block = np.empty((min(step, out.shape[0] - at), shape[1]), out.dtype)
            _fill_run(block, stream, start + at * row)
            out[at : at + step] = block[:, index[1]]
    else:
        for at in range(out.shape[0]):
            _fill(out[at], stream, start + at * row, shape[1:], index[1:])


def _fill_run(out: np.ndarray, stream: BinaryIO, start: int) -> None:
    """Reads consecutive bytes into a C-ordered array."""
    target = out.reshape(-1).view(np.uint8)
    stream.seek(start)
    for at in range(0, target.size, BLOCK_BYTES):
        part = target[at : at + BLOCK_BYTES]
        part[:] = np.frombuffer(stream.read(part.size), np.uint8)


def write_file(
    path: epath.PathLike, arrays: Mapping[str, LazyArray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file block by block."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Wide dtypes first, so that every tensor is aligned to its dtype.
    order = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    end = 0
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with epath.Path(path).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in arrays[name].blocks():
                stream.write(block.reshape(-1).view(np.uint8).data)


def assign_shards(arrays: Mapping[str, Any], limit: int) -> list[list[str]]:
    """Names by shard: in order, a new shard where the next array would pass `limit` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, array in arrays.items():
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        # The header takes some bytes per tensor; 256 is more than a name and its numbers.
        if shards[-1] and filled + size + 256 > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size + 256
    return shards


def shard_name(index: int, count: int) -> str:
    """The published name of shard `index`, counted from 1."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"
