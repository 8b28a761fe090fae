"""The MLP connector again in float64 NumPy, token by token."""

import numpy as np

from tests.models.towers.oracle import gelu, linear


def project(params, x):
    """[..., D_vision] -> [..., D]."""
    return linear(params["linear_2"], gelu(linear(params["linear_1"], np.asarray(x, np.float64))))


def pool_grid(grid, mode, stride):
    """[h, w, D] -> [h', w', D], one output at a time."""
    h, w, D = grid.shape
    if mode == "none":
        return grid
    if mode == "bilinear":
        shape = (-(-h // stride), -(-w // stride))
        out = np.empty((*shape, D))
        for i, j in np.ndindex(*shape):
            y, x = (i + 0.5) * h / shape[0] - 0.5, (j + 0.5) * w / shape[1] - 0.5
            out[i, j] = _sample(grid, y, x)
        return out
    out = np.empty((h // stride, w // stride, D))
    for i, j in np.ndindex(*out.shape[:2]):
        cell = grid[i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
        out[i, j] = cell.max((0, 1)) if mode == "max" else cell.mean((0, 1))
    return out


def _sample(grid, y, x):
    """Bilinear at a point given in cells; what lies outside repeats the edge."""
    y, x = max(y, 0.0), max(x, 0.0)
    total = 0.0
    for row, a in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
        for column, b in ((int(x), 1 - x % 1), (int(x) + 1, x % 1)):
            total = total + a * b * grid[min(row, len(grid) - 1), min(column, grid.shape[1] - 1)]
    return total


def _tokens(frame, newline):
    """[h, w, D] with a newline after every row, as a list of vectors."""
    return [v for row in frame for v in (*row, newline)]


def video_tokens(config, params, clip):
    """List of token vectors of one clip [F, h, w, D_language], by the published rules."""
    newline, tokens = params.get("image_newline"), []
    for index, frame in enumerate(clip):
        if config.slow_every:
            stride = config.stride if index % config.slow_every == 0 else 2 * config.stride
            tokens += _tokens(pool_grid(frame, config.pool, stride), newline)
            tokens.append(params["faster_token"])
            continue
        frame = pool_grid(frame, config.pool, config.stride)
        if config.newline == "grid":
            tokens += _tokens(frame, newline)
        else:
            tokens += list(frame.reshape(-1, frame.shape[-1]))
            tokens += [newline] * (config.newline == "frame")
    return tokens + [newline] * (config.newline == "one_token")
