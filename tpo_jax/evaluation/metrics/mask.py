"""Segmentation: J and F of the DAVIS benchmark, gIoU and cIoU of referring segmentation.

A track is bool[frames, h, w]; its J and F are means over frames. Two empty masks agree (J = F = 1).
F is the F-measure of boundary pixels matched within ceil(0.008 * image diagonal) pixels: a boundary
pixel is matched when the other boundary has a pixel within that distance (Perazzi et al., CVPR
2016). gIoU is the mean of the images' IoU, cIoU the ratio of the summed areas (LISA, GRES).
"""

import numpy as np

BOUNDARY_TOLERANCE = 0.008


def region_similarity(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64[...]: Jaccard index of masks bool[..., h, w]; 1 where both are empty."""
    return _ratio(*areas(predicted, target))


def areas(predicted: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64[...], int64[...]: pixels in the intersection and in the union of bool[..., h, w]."""
    predicted, target = _as_masks(predicted, target)
    return _count(predicted & target), _count(predicted | target)


def mean_iou(intersection: np.ndarray, union: np.ndarray) -> float:
    """gIoU of images with these areas int[images] (from `areas`); 1 where both masks are empty."""
    return float(_ratio(intersection, union).mean())


def cumulative_iou(intersection: np.ndarray, union: np.ndarray) -> float:
    """cIoU of images with these areas int[images]; 1 where all masks are empty."""
    return float(_ratio(np.sum(intersection), np.sum(union)))


def boundary_accuracy(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64[...]: boundary F-measure of masks bool[..., h, w]."""
    predicted, target = _as_masks(predicted, target)
    shape = predicted.shape
    radius = int(np.ceil(BOUNDARY_TOLERANCE * np.hypot(*shape[-2:])))
    # All boundaries on one line, their rows and masks so far apart that what is within `radius` on
    # the line, or whole rows further, is so in the same mask.
    padding = ((0, 0), (0, radius), (0, radius + 1))
    edges, target_edges = (
        np.pad(boundary(m).reshape(-1, *shape[-2:]), padding) for m in (predicted, target)
    )
    precision = _matched_share(edges, target_edges, radius)
    recall = _matched_share(target_edges, edges, radius)
    total = precision + recall
    score = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    return score.reshape(shape[:-2])


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


def _matched_share(edges: np.ndarray, others: np.ndarray, radius: int) -> np.ndarray:
    """float64[n]: share of edge pixels within `radius` of another; 1 where there is no edge.

    Args:
      edges: bool[n, h, w], padded as in `boundary_accuracy`.
      others: bool[n, h, w].
      radius: Euclidean distance in pixels, at least 1.
    """
    count, height, width = edges.shape
    total = _count(edges)
    near = others.copy()
    near[..., 1:] |= others[..., :-1]
    near[..., :-1] |= others[..., 1:]
    left, found = np.flatnonzero(edges & ~near), np.flatnonzero(others)
    # Rows from near to far: most pixels are matched in the first few.
    for row in sorted(range(-radius, radius + 1), key=abs):
        if not left.size or not found.size:
            break
        place = left + row * width
        reach = int(np.sqrt(radius**2 - row**2))
        following = np.searchsorted(found, place - reach)
        nearest = found[np.minimum(following, len(found) - 1)]
        left = left[np.abs(nearest - place) > reach]
    lost = np.diff(np.searchsorted(left, np.arange(count + 1) * (height * width)))
    return _ratio(total - lost, total)


def _count(masks: np.ndarray) -> np.ndarray:
    """int64[...]: set pixels of bool[..., h, w]."""
    bits = np.packbits(masks.reshape(*masks.shape[:-2], -1), axis=-1)
    return np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """float64[...]; 1 where the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.ones_like(part), where=whole > 0)


def _as_masks(predicted: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # What pycocotools decodes lies column by column, which is slow to walk in rows.
    predicted, target = (np.ascontiguousarray(mask, bool) for mask in (predicted, target))
    if predicted.shape != target.shape or predicted.ndim < 2:
        raise ValueError(
            f"masks: expected equal shapes [..., h, w], got {predicted.shape} and {target.shape}"
        )
    return predicted, target
