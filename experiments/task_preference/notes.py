"""What a reader of the page has to know of each study before its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.task_preference.trained import mean_over_seeds

ABOUT = {
    "central": (
        "Every arm is one joint stage of `configs/task_preference.py`, which says how many "
        "questions its rows are made for; what was asked stands in the last table."
    ),
    "temporal_head": "Temporal questions beside conversation; published beside all other heads.",
    "mask_loss": (
        "One SAM 2 for all seeds, which learned to follow drawn boxes in the videos of seed 0 and "
        "is frozen from then on."
    ),
}


def notes(name: str, record: Mapping[str, Any]) -> list[str]:
    """Paragraphs under a study's title."""
    return [ABOUT[name], *(_central(record) if name == "central" else [])]


def _central(record: Mapping[str, Any]) -> list[str]:
    return [
        "`text` has longer answers, so that a step of it has two batches of rows. Trained on, over "
        f"what `heads` was: {over_heads(record, 'text')}; {over_heads(record, 'conversation')}. An "
        "arm that was asked more, or read more, has that in its favour."
    ]


def over_heads(record: Mapping[str, Any], arm: str) -> str:
    """As "`text` 1.00 of the steps, 2.01 of the positions, 1.10 of the conversation questions"."""
    run, heads = (mean_over_seeds(record["trained"][name]) for name in (arm, "heads"))
    shares = {name: run[name] / heads[name] for name in ("steps", "positions")}
    shares |= {
        f"{kind} questions": count / heads["examples"][kind]
        for kind, count in run["examples"].items()
    }
    return f"`{arm}` " + ", ".join(f"{share:.2f} of the {name}" for name, share in shares.items())


def trained_table(record: Mapping[str, Any]) -> list[str]:
    """What each arm was trained on and how long that took, means over seeds."""
    runs = {arm: mean_over_seeds(of_seeds) for arm, of_seeds in record["trained"].items()}
    kinds = sorted({kind for run in runs.values() for kind in run["examples"]})
    head = [*(f"{kind} questions" for kind in kinds), "positions", "steps", "CPU seconds"]
    rows = ["| trained on | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for arm, run in runs.items():
        seconds = record["training_cpu_seconds"][arm]
        asked = run["examples"]
        cells = [f"{asked[kind]:.0f}" if kind in asked else "" for kind in kinds]
        cells += [f"{run['positions']:.0f}", f"{run['steps']:.0f}"]
        cells += [f"{sum(seconds) / len(seconds):.0f}"]
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    rows += ["", "Positions are those of the language model in all steps, padding included."]
    return rows
