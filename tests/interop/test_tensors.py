"""Parts of arrays in safetensors files, and the bytes that are read for them."""

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tpo_jax.interop import tensors
from tpo_jax.interop.tensors import read_parts, stacked, transposed

ROWS, COLUMNS = 24, 4096  # float32: a row is four pages


@pytest.fixture
def read(monkeypatch):
    """Bytes of every read from a file."""
    sizes, real = [], tensors._fill_run

    def counted(out, stream, start):
        sizes.append(out.nbytes)
        real(out, stream, start)

    monkeypatch.setattr(tensors, "_fill_run", counted)
    return sizes


@pytest.fixture
def layers(tmp_path):
    """Three matrices of a file, as they are and as arrays."""
    rng = np.random.default_rng(0)
    whole = {str(i): rng.normal(size=(ROWS, COLUMNS)).astype(np.float32) for i in range(3)}
    safetensors.numpy.save_file(whole, tmp_path / "a.safetensors")
    arrays = tensors.read_file(epath.Path(tmp_path / "a.safetensors"))
    return list(whole.values()), [arrays[name] for name in whole]


def columns(width, numbers):
    """Those of `numbers`, in parts of one width."""
    return [(width * n, width * (n + 1)) for n in numbers]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("width", "numbers", "row"),
    [
        # Narrow parts of four devices, which need not be neighbours: whole rows, once.
        (64, (0, 1, 8, 9), 4 * COLUMNS),
        # What they span is a page: that alone.
        (512, (2, 3), 4 * 1024),
        # Parts of a page, each by itself.
        (1024, (0, 3), 2 * 4 * 1024),
    ],
)
def test_parts_of_one_process_are_read_once(layers, read, turned, width, numbers, row):
    whole, arrays = layers
    wide = columns(width, numbers)
    one, stack = arrays[0], stacked([transposed(x) if turned else x for x in arrays])
    boxes = [(ends, (0, ROWS)) if turned else ((0, ROWS), ends) for ends in wide]
    for array, lead, count in ((transposed(one) if turned else one, (), 1), (stack, ((0, 3),), 3)):
        read.clear()
        parts = read_parts(array, [(*lead, *box) for box in boxes], np.float64)
        assert sum(read) == count * ROWS * row
        for (start, stop), part in zip(wide, parts.values(), strict=True):
            expected = np.stack([x[:, start:stop].T if turned else x[:, start:stop] for x in whole])
            np.testing.assert_array_equal(part, expected if lead else expected[0])
            assert part.dtype == np.float64


def test_parts_of_other_rows_are_read_by_themselves(layers, read):
    """Four devices that split rows and columns of the middle layer."""
    whole, arrays = layers
    boxes = [((1, 2), rows, ends) for rows in ((0, 6), (18, 24)) for ends in columns(64, (0, 1))]
    parts = read_parts(stacked(arrays), boxes, np.float32)
    assert sum(read) == 2 * 6 * 4 * COLUMNS
    for box, part in parts.items():
        np.testing.assert_array_equal(part, np.stack(whole)[tuple(slice(*ends) for ends in box)])


def test_rows_are_read_alone(layers, read):
    whole, arrays = layers
    parts = read_parts(arrays[0], [((0, 3), (0, COLUMNS)), ((6, 9), (0, COLUMNS))], np.float32)
    assert sum(read) == 6 * 4 * COLUMNS
    np.testing.assert_array_equal(parts[(6, 9), (0, COLUMNS)], whole[0][6:9])
