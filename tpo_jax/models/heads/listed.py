"""Heads of other packages, listed in the environment: TPO_JAX_HEADS=module[,module].

A module registers its heads when it is imported. Every command does that first, and so does every
process that it starts: preparing, predicting and evaluating import no config that could do it.
"""

import importlib
import os
import sys

from tpo_jax.errors import UserError, report
from tpo_jax.models.heads import HEADS

VARIABLE = "TPO_JAX_HEADS"


def load_listed() -> None:
    """Imports what the environment lists; what is imported already stays as it is.

    A module that is not there, cannot be imported or registers no head ends the command.
    """
    try:
        for name in filter(None, (p.strip() for p in os.environ.get(VARIABLE, "").split(","))):
            _load(name)
    except UserError as error:
        sys.exit(report(error))


def _load(name: str) -> None:
    new, before = name not in sys.modules, set(HEADS)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            missing = f"it imports {error.name!r}, which is not there"
            raise _problem(name, missing, "install that") from error
        fix = "correct the name, or add the module's folder to PYTHONPATH"
        raise _problem(name, "there is no such module", fix) from error
    except ValueError as error:  # of `register`
        raise _problem(name, str(error), "change that head") from error
    if new and set(HEADS) == before:
        fix = "call tpo_jax.models.heads.register(HEAD) in it"
        raise _problem(name, "it registers no head", fix)


def _problem(name: str, reason: str, fix: str) -> UserError:
    return UserError(f"{VARIABLE}: {name!r}: {reason}; {fix}")
