"""What is published (arXiv 2412.19326, v2), and whether a study's seeds agree."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Claim:
    """`better` scores higher than `worse` in `metric`.

    published: both figures in percent and where they stand; None where nothing is published.
    """

    metric: str
    worse: str
    better: str
    published: tuple[float, float] | None = None
    where: str = ""


CLAIMS = {
    "central": (
        Claim("temporal/r1@0.5", "text_half", "heads", (18.6, 40.2), "Charades-STA R1@0.5"),
        Claim("qa/accuracy", "text_half", "heads", (64.7, 66.8), "MVBench"),
        Claim("temporal/r1@0.5", "text", "heads", (18.6, 40.2), "Charades-STA R1@0.5"),
        Claim("qa/accuracy", "text", "heads", (64.7, 66.8), "MVBench"),
        Claim("temporal/r1@0.5", "T", "TRM", (30.2, 36.7), "Charades-STA R1@0.5"),
        Claim("region/acc@0.5", "R", "TRM", (77.3, 81.6), "RefCOCO family, mean Acc@0.5"),
        Claim("mask/j&f", "M", "TRM", (55.1, 61.4), "Ref-YouTube-VOS J&F"),
        Claim("temporal/r1@0.5", "TRM", "heads", (36.7, 40.2), "Charades-STA R1@0.5"),
        Claim("qa/accuracy", "conversation", "heads"),
        Claim("qa/accuracy", "conversation", "text"),
        Claim("region/acc@0.5", "text", "heads"),
        Claim("mask/j&f", "text", "heads"),
        Claim("tracking/auc", "text", "heads"),
    ),
    "temporal_head": (
        Claim("temporal/r1@0.5", "temporal_mlp", "cg_detr", (17.8, 40.2), "Charades-STA R1@0.5"),
        Claim("temporal/miou", "temporal_mlp", "cg_detr", (15.4, 38.1), "Charades-STA mIoU"),
        Claim("qa/accuracy", "temporal_mlp", "cg_detr", (65.8, 66.8), "MVBench"),
        Claim("temporal/r1@0.5", "cg_detr", "temporal"),
    ),
    "mask_loss": (
        Claim("mask/j&f", "first_frame_box", "sam2"),
        Claim("mask/j", "first_frame_box", "sam2"),
        Claim("mask/j&f", "first_frame_box", "sam2_all"),
        Claim("mask/j", "first_frame_box", "sam2_all"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean over seeds and its standard error, which one seed does not have."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        if not values:
            raise ValueError("values: none, expected one a seed")
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread)

    def percent(self, sign: bool = False) -> str:
        """As "40.2 ± 1.3"."""
        mean = f"{100 * self.mean:+.1f}" if sign else f"{100 * self.mean:.1f}"
        return mean if self.error is None else f"{mean} ± {100 * self.error:.1f}"


def difference(claim: Claim, arms: Mapping[str, Mapping[str, Sequence[float]]]) -> Estimate:
    """better - worse, seed by seed: both arms of a seed have the same videos."""
    pairs = zip(arms[claim.worse][claim.metric], arms[claim.better][claim.metric], strict=True)
    return Estimate.of([better - worse for worse, better in pairs])


def verdict(found: Estimate) -> str:
    """ "agrees" or "does not agree" where the difference is more than two standard errors."""
    if found.error is None:
        return "one seed"
    if abs(found.mean) <= 2 * found.error:
        return "undecided"
    return "agrees" if found.mean > 0 else "does not agree"
