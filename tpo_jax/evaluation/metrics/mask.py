"""Video object segmentation: region similarity J and boundary accuracy F of the DAVIS benchmark.

A track is bool[frames, h, w]; its J and F are means over frames. Two empty masks agree (J = F = 1).
F is the F-measure of boundary pixels matched within ceil(0.008 * image diagonal) pixels: each
boundary is dilated by a disk of that radius before the other is looked up in it (Perazzi et al.,
CVPR 2016).
"""

import numpy as np

BOUNDARY_TOLERANCE = 0.008


def region_similarity(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64[...]: Jaccard index of masks bool[..., h, w]; 1 where both are empty."""
    predicted, target = _as_masks(predicted, target)
    intersection = (predicted & target).sum((-2, -1)).astype(np.float64)
    union = (predicted | target).sum((-2, -1))
    return np.divide(intersection, union, out=np.ones_like(intersection), where=union > 0)


def boundary_accuracy(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64[...]: boundary F-measure of masks bool[..., h, w]."""
    predicted, target = _as_masks(predicted, target)
    radius = int(np.ceil(BOUNDARY_TOLERANCE * np.hypot(*predicted.shape[-2:])))
    edges, target_edges = boundary(predicted), boundary(target)
    precision = _matched_share(edges, dilate(target_edges, radius))
    recall = _matched_share(target_edges, dilate(edges, radius))
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)


def boundary(masks: np.ndarray) -> np.ndarray:
    """bool[..., h, w]: pixels that differ from the neighbour to the right, below or both.

    The last row looks only to the right, the last column only below, and the last pixel is never a
    boundary, as in the Berkeley benchmark that DAVIS took this from.
    """
    masks = np.asarray(masks, bool)
    width = [(0, 0)] * (masks.ndim - 2) + [(0, 1), (0, 1)]
    padded = np.pad(masks, width, mode="edge")
    right, below, diagonal = padded[..., :-1, 1:], padded[..., 1:, :-1], padded[..., 1:, 1:]
    return (masks != right) | (masks != below) | (masks != diagonal)


def dilate(masks: np.ndarray, radius: int) -> np.ndarray:
    """bool[..., h, w]: every pixel within `radius` (Euclidean) of a set pixel."""
    masks = np.asarray(masks, bool)
    height, width = masks.shape[-2:]
    padded = np.pad(masks, [(0, 0)] * (masks.ndim - 2) + [(radius, radius)] * 2)
    out = np.zeros_like(masks)
    for dy in range(-radius, radius + 1):
        reach = int(np.sqrt(radius**2 - dy**2))
        for dx in range(-reach, reach + 1):
            rows = slice(radius + dy, radius + dy + height)
            out |= padded[..., rows, radius + dx : radius + dx + width]
    return out


def mask_box(mask: np.ndarray) -> list[float] | None:
    """Normalised (x1, y1, x2, y2) around the set pixels of bool[h, w]; None for an empty mask."""
    mask = np.asarray(mask, bool)
    if not mask.any():
        return None
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x1, x2 = columns[0] / width, (columns[-1] + 1) / width
    y1, y2 = rows[0] / height, (rows[-1] + 1) / height
    return [float(x1), float(y1), float(x2), float(y2)]


def box_mask(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool[h, w]: the pixels whose centre lies in a normalised box."""
    x1, y1, x2, y2 = box
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return ((y >= y1) & (y < y2))[:, None] & ((x >= x1) & (x < x2))[None, :]


def _matched_share(edges: np.ndarray, reachable: np.ndarray) -> np.ndarray:
    """Share of boundary pixels that reach the other boundary; 1 where there is no boundary."""
    count = edges.sum((-2, -1))
    matched = (edges & reachable).sum((-2, -1)).astype(np.float64)
    return np.divide(matched, count, out=np.ones_like(matched), where=count > 0)


def _as_masks(predicted: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted, target = np.asarray(predicted, bool), np.asarray(target, bool)
    if predicted.shape != target.shape or predicted.ndim < 2:
        raise ValueError(
            f"masks: expected equal shapes [..., h, w], got {predicted.shape} and {target.shape}"
        )
    return predicted, target
