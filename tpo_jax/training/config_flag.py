"""--config=FILE.py:ARG as in ml_collections, or --config=WORKDIR/config.json to run that again."""

import json
import re
import sys
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from tpo_jax.errors import UserError, report
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
    flag.parser = _Parser(flag.parser, name, sys_argv)
    return holder


def parse_flags(argv: list[str]) -> list[str]:
    """The `flags_parser` of app.run: a mistake on the command line is one line, not a traceback."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(report(mistake(error)))
    except SystemExit:  # absl exits with 1 once it has printed what --help asks for
        sys.exit(0)


def mistake(error: flags.Error) -> UserError:
    """What a config file found wrong; else what absl says about a flag."""
    found, cause = UserError(str(error)), error
    while cause := cause.__cause__ or cause.__context__:
        # ml_collections raises the class of an error again, with a traceback as its message.
        found = cause if isinstance(cause, UserError) else found
    return found


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
    """Reads JSON by itself and leaves Python files to ml_collections.

    Raises ConfigError for a file that is not there and an option that the config does not have.
    """

    def __init__(
        self, python_files: flags.ArgumentParser, name: str, argv: list[str] | None
    ) -> None:
        self._python_files, self._name, self._argv = python_files, name, argv

    def parse(self, path: str) -> Any:
        if path.endswith(".json"):
            config = read_json(path).lock()
        else:
            file = path.split(":", 1)[0]
            if not epath.Path(file).exists():
                raise training_config.ConfigError(
                    f"--{self._name}: {file} does not exist; correct the path"
                )
            config = self._python_files.parse(path)
        for argument in sys.argv if self._argv is None else self._argv:
            if match := re.match(rf"--?(?:no)?{self._name}\.([^=]+)", argument):
                self._check_option(config, match[1])
        return config

    def _check_option(self, config: ConfigDict, option: str) -> None:
        """`option` is such as optimizer.name; of lists and what they hold ml_collections tells."""
        part, at = config, self._name
        for key in option.split("."):
            if "[" in key or not isinstance(part, ConfigDict):
                return
            if key not in part:
                known = ", ".join(sorted(part))
                raise training_config.ConfigError(
                    f"--{self._name}.{option}: {at} has no {key!r}; it has {known}"
                )
            part, at = part[key], f"{at}.{key}"
