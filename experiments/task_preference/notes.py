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
    "temporal_head": (
        "Temporal questions beside conversation; published beside all other heads. Rates and "
        "weights of the demo were tuned for the light head `temporal`. The language loss has "
        "weight 8; those of `cg_detr` are the published ones times 0.4, which is the published "
        "twentieth of it. All have four times the steps of the other studies. With as many as "
        "those, at rate 1, R1@0.5 was 12.6 ± 1.2 for `cg_detr`, whose label loss had not moved, "
        "27.6 ± 6.1 for `temporal_mlp` and 38.5 ± 7.0 for `temporal` (three seeds, commit "
        "a4e5387): two layers start faster."
    ),
    "mask_loss": (
        "One SAM 2 for all seeds, which learned from random weights to follow what is masked in "
        "the videos of seed 0, each from a box around it, and is frozen from then on. Masks alone "
        "are asked: there is no conversation beside them, as there is in the last published "
        "stage. The head of `first_frame_box` learns as published from the first frame alone: "
        "from the prompt that the box of the object would be, and from that box, which a second "
        "network reads out of the slot state and which is -1 where the object is absent. Such an "
        "object has no prompt here; of the release no such exception is known. `sam2` has the "
        "losses of the masks and neither of these, `sam2_all` all of them, with the box of the "
        "labelled frame that shows most of the object. At test all arms prompt the frame where "
        "the head is surest, which the published method, always on the first, does not: two ways "
        "to learn are compared, not two systems. All arms have four times the steps of the "
        "central study. With as many as there J&F was 26.6 ± 0.3 for `first_frame_box` and 28.2 ± "
        "1.6 for `sam2` (three seeds, commit 0fbb8f7). Published are clips of 8 frames; SAM 2 "
        "learned on such of 4 seconds, and the arms show 8 frames of 16 seconds, so that it "
        "follows over longer steps there than it learned to and than in tests."
    ),
}
FLOORS = (
    "*floor* is the best of answers that do not look: constant ones, chosen on the training "
    "videos, and for tracks the drawn box held still"
)
MIDDLE_FRAME = (
    "; for questions also a model that was trained on conversation about the middle frame alone, "
    "at rate 1 without a search, with its last weights"
)
UNSEARCHED = "No rate was searched: all arms learn at those of the demo."
# A search that was not of the run of the tables: `Study.record` writes no such key.
APART = (
    "The command searches rates before it trains; here it did not. The arms had been run at rate 1 "
    "without a search; that was done afterwards, at commit {commit}, by the same command in a "
    "folder of its own, which was stopped after it had chosen, and `rates` and `search` were added "
    "to the record from there."
)
MINUTES, CORES = 90, 2  # that all studies should take


def notes(name: str, record: Mapping[str, Any]) -> list[str]:
    """Paragraphs under a study's title."""
    asks = "qa/accuracy" in record["floors"]
    own = _central(record) if name == "central" else []
    own.append(_searched(record) if "search" in record else UNSEARCHED)
    if apart := record.get("search_apart"):
        own.append(APART.format(commit=apart["commit"]))
    return [ABOUT[name], *own, f"{FLOORS}{MIDDLE_FRAME if asks else ''}."]


def _central(record: Mapping[str, Any]) -> list[str]:
    compared = (over_heads(record, arm) for arm in ("text", "text_half", "conversation"))
    return [
        "`text` has longer answers, so that a step of it has two batches of rows. Trained on, over "
        f"what `heads` was: {'; '.join(compared)}. An arm that was asked more, or read more, has "
        "that in its favour.",
        "`text` is read by rules, and what its words cannot say is lost: *words at best* are the "
        "labels themselves, written and read back. A mask is boxes at three times, in which "
        "everything counts as object. Words have no saliency: its highlight metrics come from the "
        "reader, for which a clip is the better the nearer it is to the middle of the named "
        "window, and say nothing of the model beyond its windows.",
    ]


def _searched(record: Mapping[str, Any]) -> str:
    """How the rates were found, and whether better ones may lie beyond those tried."""
    found = []
    for arm, means in record["search"].items():
        tried = ", ".join(f"{rate}: {100 * mean:.1f}" for rate, mean in means.items())
        found.append(f"`{arm}` {record['rates'][arm]:g}{_at_an_end(record, arm)} ({tried})")
    said = (
        "Learning rates, times those of the demo, each chosen by the mean of validation metrics of "
        f"seed 0 (in brackets, in percent): {'; '.join(found)}."
    )
    if set(record["search"]) >= set(record["trained"]):
        return said
    return said + (
        " No others were searched: all other arms, `conversation` among them, run at the rate of "
        "`heads`, which need not be their best."
    )


def _at_an_end(record: Mapping[str, Any], arm: str) -> str:
    tried, chosen = sorted(map(float, record["search"][arm])), record["rates"][arm]
    if len(tried) == 1:
        return ", the only one tried"
    if chosen not in (tried[0], tried[-1]):
        return ", between others that were tried"
    which = "lowest" if chosen == tried[0] else "highest"
    return f", the {which} that was tried: a better one may lie beyond"


def over_heads(record: Mapping[str, Any], arm: str) -> str:
    """As "`text` 1.00 of the steps, 2.01 of the positions, 1.10 of the conversation questions"."""
    run, heads = (mean_over_seeds(record["trained"][name]) for name in (arm, "heads"))
    shares = {name: run[name] / heads[name] for name in ("steps", "positions")}
    shares |= {
        f"{kind} questions": count / heads["examples"][kind]
        for kind, count in run["examples"].items()
    }
    return f"`{arm}` " + ", ".join(f"{share:.2f} of the {name}" for name, share in shares.items())


def spent(record: Mapping[str, Any]) -> str:
    apart = (
        " The search for rates is not among it: it was run later, in another folder, and its "
        "processor time was not kept."
    )
    return (
        "Processor minutes of everything in the folder of runs until then, evaluations, floors and "
        f"other studies among it: {record['cpu_seconds'] / 60:.0f}."
        f"{apart if 'search_apart' in record else ''} All studies together should "
        f"take about {MINUTES} minutes on {CORES} cores, which is {MINUTES * CORES}."
    )


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
