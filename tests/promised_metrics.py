"""Keys that summary.json promises to those who read it."""

PREFERENCE = {"preference/accuracy", "preference/accuracy_blind"}
METRICS = PREFERENCE | {
    "qa/accuracy", "temporal/r1@0.5", "temporal/miou", "highlight/hit@1", "region/acc@0.5",
    "mask/j", "mask/f", "tracking/auc",
}  # fmt: skip
