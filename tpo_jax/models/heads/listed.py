"""Heads of other packages, listed in the environment: TPO_JAX_HEADS=module[,module].

A module registers its heads when it is imported. Every command does that first, and so does every
process that it starts: preparing, predicting and evaluating import no config that could do it.
"""

import importlib
import os
import sys

from tpo_jax.models.heads import HEADS

VARIABLE = "TPO_JAX_HEADS"


def load_listed() -> None:
    """Imports what the environment lists; what is imported already stays as it is.

    Raises:
      SystemExit: naming a module that is not there, cannot be imported or registers no head.
    """
    for name in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        new, before = name not in sys.modules, set(HEADS)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                missing = f"it imports {error.name!r}, which is not there"
                raise SystemExit(_problem(name, missing, "install that")) from error
            fix = "correct the name, or add the module's folder to PYTHONPATH"
            raise SystemExit(_problem(name, "there is no such module", fix)) from error
        except ValueError as error:  # of `register`
            raise SystemExit(_problem(name, str(error), "change that head")) from error
        if new and set(HEADS) == before:
            fix = "call tpo_jax.models.heads.register(HEAD) in it"
            raise SystemExit(_problem(name, "it registers no head", fix))


def _problem(name: str, reason: str, fix: str) -> str:
    return f"error: {VARIABLE}: {name!r}: {reason}; {fix}"
