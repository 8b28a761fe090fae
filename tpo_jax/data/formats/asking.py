"""The question and answer that a label without a conversation becomes; one wording per task."""

from __future__ import annotations

from tpo_jax.data.records import Turn


def moment(query: str) -> Turn:
    """When something happens."""
    return Turn(
        f'When does this happen: "{query.rstrip(".")}"?',
        "It happens at <temporal>.",
        kind="temporal",
    )


def region(phrase: str, time: float | None = None) -> Turn:
    """Where something is, in an image or at `time` seconds of a video."""
    when = "" if time is None else f" at {time:g} s"
    return Turn(f'Where is "{phrase}"{when}?', "It is at <region>.", kind="region")


def referred_mask(expression: str) -> Turn:
    """Which pixels something covers, over a video."""
    return Turn(f'Which pixels show "{expression}"?', "It is <mask>.", kind="mask")


def tracking() -> Turn:
    """Where a box goes. It does not name the object, so that the box must be read."""
    return Turn("Where does the object at <box> go?", "It moves along <mask>.", kind="tracking")
