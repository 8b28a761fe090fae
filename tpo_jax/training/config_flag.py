"""--config=FILE.py:ARG as in ml_collections, or --config=WORKDIR/config.json to run that again."""

import json
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from tpo_jax.training import config as training_config


def define_config(
    name: str,
    help: str = "Config file, FILE.py[:ARG] or WORKDIR/config.json.",
    flag_values: flags.FlagValues = flags.FLAGS,
    sys_argv: list[str] | None = None,
) -> flags.FlagHolder:
    """Defines --NAME and --NAME.a.b=VALUE.

    Args:
      flag_values: where.
      sys_argv: the command line that changes values; None: of this process.
    """
    holder = config_flags.DEFINE_config_file(name, None, help, flag_values, sys_argv=sys_argv)
    flag = flag_values[name]
    flag.parser = _Parser(flag.parser)
    return holder


def read_json(path: epath.PathLike) -> ConfigDict:
    """The config of a workdir's config.json, local or gs://, unlocked."""
    path = epath.Path(path)
    if not path.exists():
        raise training_config.ConfigError(f"{path}: no such config; expected WORKDIR/config.json")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise training_config.ConfigError(f"{path}: not JSON ({error})") from error
    return training_config.from_dict(values)


def define_dry_run(name: str, help: str) -> flags.FlagHolder:
    """Defines --NAME and --NAME=compile; the value is "", "check" or "compile"."""
    flag = flags.Flag(_DryRunParser(), flags.ArgumentSerializer(), name, "", help, boolean=True)
    return flags.DEFINE_flag(flag)


class _DryRunParser(flags.ArgumentParser):
    """A flag without a value arrives as "true"."""

    def parse(self, argument: str) -> str:
        known = {"true": "check", "false": "", "": "", "check": "check", "compile": "compile"}
        if str(argument).lower() not in known:
            raise ValueError(f"{argument!r}: expected nothing, or compile")
        return known[str(argument).lower()]


class _Parser(flags.ArgumentParser):
    """Reads JSON by itself and leaves Python files to ml_collections."""

    def __init__(self, python_files: flags.ArgumentParser) -> None:
        self._python_files = python_files

    def parse(self, path: str) -> Any:
        if path.endswith(".json"):
            return read_json(path).lock()
        return self._python_files.parse(path)
