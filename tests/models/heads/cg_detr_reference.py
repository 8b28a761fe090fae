"""The losses of the CG-DETR head once more: NumPy, float64, one slot and one clip at a time."""

import numpy as np
import scipy.optimize


def softplus(x):
    return np.logaddexp(0.0, x)


def log_softmax(x):
    return x - np.logaddexp.reduce(x)


def giou(a, b):
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    hull = max(a[1], b[1]) - min(a[0], b[0])
    return shared / union - (hull - union) / hull


def span_terms(logits, spans, windows):
    """l1, giou (sums over windows) and label of one slot and layer.

    logits [Q, 2], spans [Q, 2] centre and width, windows [W, 2] start and end, the valid ones.
    """
    wanted = [(np.mean(w), w[1] - w[0]) for w in windows]
    ends = [(c - w / 2, c + w / 2) for c, w in spans]
    log_p = np.array([log_softmax(row) for row in logits])
    cost = np.empty((len(spans), len(windows)))
    for q in range(len(spans)):
        for w in range(len(windows)):
            l1 = np.abs(spans[q] - wanted[w]).sum()
            cost[q, w] = 10 * l1 - giou(ends[q], windows[w]) - 4 * np.exp(log_p[q, 0])
    queries, matched = scipy.optimize.linear_sum_assignment(cost)
    pairs = list(zip(queries, matched, strict=True))
    label = [-log_p[q, 0] if q in queries else -0.1 * log_p[q, 1] for q in range(len(spans))]
    return {
        "l1": sum(np.abs(spans[q] - wanted[w]).mean() for q, w in pairs),
        "giou": sum(1 - giou(ends[q], windows[w]) for q, w in pairs),
        "label": np.mean(label),
    }


def margin(scores, grade, judged):
    relevant = [t for t in range(len(scores)) if judged[t] and grade[t] > 0]
    rest = [t for t in range(len(scores)) if judged[t] and grade[t] <= 0]
    easy = np.mean([max(0.0, 0.2 + scores[n] - scores[p]) for p in relevant for n in rest])
    best = max(relevant, key=lambda t: grade[t])
    worst = min(relevant, key=lambda t: grade[t])
    if grade[best] == grade[worst]:
        return 2 * easy
    return easy + max(0.0, 0.2 + scores[worst] - scores[best])


def rank(scores, grade, judged, other, shown):
    """`other` scores of a negative query on clips `shown`, or None."""
    marks = [(scores[t], grade[t]) for t in range(len(scores)) if judged[t]]
    if other is not None:
        marks += [(other[t], 0) for t in range(len(other)) if shown[t]]
    log_p = log_softmax(np.array([score for score, _ in marks]) / 0.5)
    total = 0.0
    for threshold in range(1, 12):
        chosen = [log_p[i] for i, (_, mark) in enumerate(marks) if mark >= threshold]
        total += -np.mean(chosen) if chosen else 0.0
    return total / 12


def negative(other, shown):
    return sum(softplus(other[t]) for t in range(len(other)) if shown[t])


def attention_negative(other, shown):
    return sum(-np.log(1 - other[t]) for t in range(len(other)) if shown[t])


def attention_bce(mass, grade, judged):
    chosen = np.flatnonzero(judged)
    return np.mean([-np.log(mass[t] if grade[t] > 0 else 1 - mass[t]) for t in chosen])


def clips(logits, grade, judged):
    chosen = np.flatnonzero(judged)
    return np.mean([softplus(-logits[t] if grade[t] > 0 else logits[t]) for t in chosen])


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def align(own, slots):
    """Of the slot `own`; each of `slots` a dict with video, has_other and the four tokens."""
    near = [s for s in slots if s is own or s["video"] != own["video"]]
    rows = [own["moment"], own["other"]] if own["has_other"] else [own["moment"]]
    with_sentence = log_softmax(np.array([cosine(r, s["sentence"]) for r in rows for s in near]))
    mine = next(i for i, s in enumerate(near) if s is own)
    with_dummy = log_softmax(np.array([cosine(r, s["dummy_sentence"]) for r in rows for s in near]))
    rest = [p for i, p in enumerate(with_dummy) if i != mine]
    return -with_sentence[mine] - (np.mean(rest) if rest else 0.0)


def distill(wanted, attention, valid):
    each = [p * (np.log(p) - np.log(a + 1e-6)) for p, a, v in
            zip(wanted, attention, valid, strict=True) if v]  # fmt: skip
    return np.mean(each)


def overlap(vectors):
    total = sum(abs(cosine(a, b)) for i, a in enumerate(vectors)
                for j, b in enumerate(vectors) if i != j)  # fmt: skip
    return total / len(vectors) ** 2
