"""Moves models between this program and PyTorch.

    python -m tpo_jax.convert export --model=runs/demo/dpo/model --out=exported
    python -m tpo_jax.convert import --source=exported --out=model
    python -m tpo_jax.convert check  --model=model --exported=exported   (needs torch, transformers)
"""

import argparse
import sys

from tpo_jax.interop import export
from tpo_jax.interop.folder import ModelFolderError
from tpo_jax.interop.mapping import MappingError


def _export(flags: argparse.Namespace) -> int:
    files = export.export_model(flags.model, flags.out)
    print(f"{flags.out}: " + ", ".join(files))
    return 0


def _import(flags: argparse.Namespace) -> int:
    config = export.import_model(flags.source, flags.out)
    print(f"{flags.out}: heads {', '.join(config.heads) or 'none'}")
    return 0


def _check(flags: argparse.Namespace) -> int:
    from tpo_jax.interop import check

    differences = check.compare(flags.model, flags.exported)
    for part, difference in differences.items():
        print(f"{part:24s} {difference:.2e}")
    wrong = [part for part, difference in differences.items() if difference > flags.tolerance]
    if wrong:
        print(f"first difference above {flags.tolerance}: {wrong[0]}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tpo_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help="model folder -> Hugging Face and PyTorch files")
    command.add_argument("--model", required=True, help="model folder")
    command.add_argument("--out", required=True, help="folder to write")
    command.set_defaults(run=_export)
    command = commands.add_parser("import", help="exported folder -> model folder")
    command.add_argument("--source", required=True, help="folder that `export` wrote")
    command.add_argument("--out", required=True, help="model folder to write")
    command.set_defaults(run=_import)
    command = commands.add_parser("check", help="run both sides on the same inputs and compare")
    command.add_argument("--model", required=True, help="model folder")
    command.add_argument("--exported", required=True, help="folder that `export` wrote from it")
    command.add_argument("--tolerance", type=float, default=2e-4, help="largest difference")
    command.set_defaults(run=_check)
    flags = parser.parse_args()
    try:
        return flags.run(flags)
    except (export.ExportFolderError, ModelFolderError, MappingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
