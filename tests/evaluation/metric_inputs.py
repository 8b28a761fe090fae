"""What the metric tests share: submissions in the published formats, and tables laid flat."""

import numpy as np

from experiments.benchmarks import metric_oracles


def qvhighlights(seed: int, queries: int, grid: float = 0.0) -> tuple[list[dict], list[dict]]:
    """Submission and labels; a grid makes ties, exact thresholds and zero-length windows."""
    rng = np.random.default_rng(seed)
    submission, labels = [], []
    for qid in range(queries):
        duration = int(rng.choice([150, 150, 149, 60]))
        clips = duration // 2
        windows = _windows(rng, int(rng.integers(1, 14)), duration, grid)
        targets = _windows(rng, int(rng.choice([1, 1, 1, 2, 5])), duration, grid)
        if rng.random() < 0.5:  # a near hit
            windows[0] = targets[0] + (0 if grid else rng.normal(size=2))
        scores = rng.integers(0, 4, len(windows)) / 4 if grid else rng.random(len(windows))
        saliency = rng.integers(-2, 3, clips) / 2 if grid else rng.normal(size=clips)
        saliency = np.append(saliency, rng.normal(size=3))[: clips + int(rng.integers(-3, 4))]
        relevant = np.flatnonzero(rng.random(clips) < rng.choice([0, 0.2, 1]))
        submission.append(
            {
                "qid": qid,
                "pred_relevant_windows": np.column_stack([windows, scores]).tolist(),
                "pred_saliency_scores": saliency.tolist(),
            }
        )
        labels.append(
            {
                "qid": qid,
                "duration": duration,
                "relevant_windows": targets.tolist(),
                "relevant_clip_ids": relevant.tolist(),
                "saliency_scores": rng.integers(0, 5, (len(relevant), 3)).tolist(),
            }
        )
    order = rng.permutation(queries)
    return [submission[index] for index in order], labels


def detection(seed: int, videos: int, grid: float = 0.0) -> tuple[dict, dict]:
    """{video: [{"label", "segment", "score"}]} of predictions, and without scores of labels."""
    rng = np.random.default_rng(seed)
    results, database = {}, {}
    for index in range(videos):
        rows, guesses = [], []
        for label in rng.choice(["jump", "run", "swim"], int(rng.integers(0, 3)), replace=False):
            targets = _windows(rng, int(rng.integers(1, 5)), 60, grid)
            rows += [{"label": str(label), "segment": target.tolist()} for target in targets]
            near = targets + (0 if grid else rng.normal(size=targets.shape))
            for window in np.concatenate([near, near, _windows(rng, 6, 60, grid)]):
                guesses.append({"label": str(label), "segment": window.tolist()})
        for guess in guesses:
            guess["score"] = float(rng.integers(0, 4) if grid else rng.random())
        database[f"v{index}"] = rows
        results[f"v{index}" if rng.random() < 0.9 else f"other{index}"] = guesses
    return results, database


def grounded_qa(seed: int, questions: int, grid: float = 0.0) -> tuple[dict, dict, dict]:
    """Spans, labelled windows and whether the answer is right, by question."""
    rng = np.random.default_rng(seed)
    names = [f"{index // 3}_{index}" for index in range(questions)]
    windows = {name: _windows(rng, int(rng.choice([1, 1, 2, 3])), 40, grid) for name in names}
    spans = {name: _windows(rng, 1, 40, grid)[0] for name in names}
    for name in names:
        if rng.random() < 0.4:
            spans[name] = windows[name][0]
    correct = {name: bool(rng.random() < 0.6) for name in names}
    as_lists = {name: rows.tolist() for name, rows in windows.items()}
    return {name: span.tolist() for name, span in spans.items()}, as_lists, correct


ALIKE = [[0, 10], [0, 5]]  # the first overlaps [0, 5] as much as [5, 10], the second does not


def degenerate_qvhighlights(seed: int, queries: int) -> tuple[list[dict], list[dict]]:
    """Submission and labels on a grid, a fifth of the windows ending before they start.

    The first query has two labels that the first window overlaps alike: which of them it claims
    decides of the second window.
    """
    submission, labels = qvhighlights(seed, queries, 5.0)
    rng = np.random.default_rng(seed)
    for record in submission:
        windows = record["pred_relevant_windows"]
        record["pred_relevant_windows"] = [_reversed(rng, window) for window in windows]
        if record["qid"] == 0:
            record["pred_relevant_windows"] = [[*ALIKE[0], 1.0], [*ALIKE[1], 0.5]]
    labels[0]["relevant_windows"] = [[0, 5], [5, 10]]
    return submission, labels


def degenerate_detection(seed: int, videos: int) -> tuple[dict, dict]:
    """As `detection` on a grid, a fifth of the segments ending before they start.

    Of a class 16 predictions at most, the most that NumPy's default sort leaves in their order
    where scores are equal (on a processor without vector sorts); odd seeds have no "run". The last
    video has labels that a segment overlaps alike, as in `degenerate_qvhighlights`.
    """
    results, database = detection(seed, videos, 6.0)
    rng = np.random.default_rng(seed)
    left = {"jump": 14, "run": 0 if seed % 2 else 16, "swim": 16}
    for guesses in results.values():
        kept = []
        for guess in guesses:
            left[guess["label"]] -= 1
            if left[guess["label"]] >= 0:
                kept.append(guess | {"segment": _reversed(rng, guess["segment"])})
        guesses[:] = kept
    database["alike"] = [{"label": "jump", "segment": segment} for segment in ([0, 5], [5, 10])]
    results["alike"] = [
        {"label": "jump", "segment": segment, "score": 5.0 - i} for i, segment in enumerate(ALIKE)
    ]
    return results, database


def degenerate_grounded_qa(seed: int, questions: int) -> tuple[dict, dict, dict]:
    """As `grounded_qa` on a grid, a fifth of the spans missing, a fifth ending before it starts."""
    spans, windows, correct = grounded_qa(seed, questions, 8.0)
    rng = np.random.default_rng(seed)
    spans = {name: span for name, span in spans.items() if rng.random() < 0.8}
    return {name: _reversed(rng, span) for name, span in spans.items()}, windows, correct


def nextgqa_files(windows: dict, correct: dict) -> tuple[dict, dict]:
    """What gsub_test.json and test-res.json hold of labelled windows and right answers."""
    labels: dict = {}
    for name, rows in windows.items():
        video, question = name.split("_")
        labels.setdefault(video, {"location": {}})["location"][question] = rows
    answers = {name: {"answer": 1, "prediction": int(right)} for name, right in correct.items()}
    return labels, answers


def moment_columns(predicted: list, targets: list) -> tuple[np.ndarray, ...]:
    """windows, scores, query, targets, target_query of lists of windows, one a query."""
    rows = np.array([w for windows in predicted for w in windows], float).reshape(-1, 3)
    labels = np.array([w for windows in targets for w in windows], float).reshape(-1, 2)
    query = np.repeat(np.arange(len(predicted)), [len(windows) for windows in predicted])
    target_query = np.repeat(np.arange(len(targets)), [len(windows) for windows in targets])
    return rows[:, :2], rows[:, 2], query, labels, target_query


def slow_query_ap(windows: list, scores: list, targets: list) -> list[float]:
    rows = [[*window, score] for window, score in zip(windows, scores, strict=True)]
    return [metric_oracles.moment_ap(rows, targets, t) for t in metric_oracles.AP_THRESHOLDS]


def _windows(rng: np.random.Generator, count: int, duration: float, grid: float) -> np.ndarray:
    """float64[count, 2]; on a grid one in six has no length."""
    windows = np.sort(rng.random((count, 2)) * duration, axis=1)
    if not grid:
        return windows
    windows = np.floor(windows / grid) * grid
    empty = rng.random(count) < 1 / 6
    windows[empty, 1] = windows[empty, 0]
    return windows


def _reversed(rng: np.random.Generator, window: list) -> list:
    """[start, end, ...], one in five with start and end exchanged."""
    return [window[1], window[0], *window[2:]] if rng.random() < 0.2 else window


def leaves(table, prefix=""):
    """(path, value) of each value in tables within tables."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
