"""Preference accuracy: how often the chosen answer is the likelier one."""


def preference_correct(chosen_logp: float, rejected_logp: float) -> float:
    """1.0 when the chosen answer has the higher summed log-probability, 0.5 on a tie."""
    difference = float(chosen_logp) - float(rejected_logp)
    if difference != difference:
        raise ValueError(
            f"a log-probability is NaN: chosen {chosen_logp}, rejected {rejected_logp}"
        )
    return 0.5 if difference == 0 else float(difference > 0)
