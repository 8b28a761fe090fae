"""What tests skip where it is not installed, by the extra of setup.cfg that brings it.

TPO_TEST_EXTRAS names extras that a run is meant to have. Without it, tests of what is missing are
skipped; with it, as `make test` sets it, an install step that was dropped is no green run.
"""

import importlib.util

MODULES = {
    "test": ("libtpu",),
    "parity": ("peft", "torch", "transformers", "trl"),
    "weights": ("gguf",),
}


def missing(extras: str) -> str:
    """What of these extras, "test,parity", cannot be found, as one message; "" if nothing."""
    absent = [
        f"{module} (extra {extra!r})"
        for extra in filter(None, extras.split(","))
        for module in MODULES[extra]
        if importlib.util.find_spec(module) is None
    ]
    if not absent:
        return ""
    return (
        f"TPO_TEST_EXTRAS={extras}: not installed: {', '.join(absent)}; tests of them would be "
        f"skipped. Run python -m pip install -e '.[{extras}]', or unset TPO_TEST_EXTRAS"
    )
