"""Moves models between this program and PyTorch.

    python -m tpo_jax.convert export --model=runs/demo/dpo/model --out=exported
    python -m tpo_jax.convert import --source=exported --out=model
    python -m tpo_jax.convert import --source=Qwen2-7B --out=qwen2   (a Hugging Face folder)
    python -m tpo_jax.convert import --source=LongVA-7B --out=longva   (a multimodal family)
    python -m tpo_jax.convert import --source=sam2.1-hiera-large --into=model --out=model2
    python -m tpo_jax.convert export --model=longva --out=exported --like=LongVA-7B
    python -m tpo_jax.convert check  --model=model --exported=exported   (needs torch, transformers)
    python -m tpo_jax.convert check  --model=longva --exported=LongVA-7B
"""

import argparse
import sys

from etils import epath

from tpo_jax.data.files import local_path
from tpo_jax.interop import export, folder, sam2_model
from tpo_jax.interop.chat_template import ChatTemplateError
from tpo_jax.interop.families import folder as families
from tpo_jax.interop.families import source
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.huggingface import HuggingFaceError
from tpo_jax.interop.mapping import MappingError
from tpo_jax.interop.peft import AdapterError
from tpo_jax.interop.tensors import TensorFileError


class OptionError(ValueError):
    """An option that means nothing for what it was given with; the message names both."""


_ERRORS = (
    export.ExportFolderError, folder.ModelFolderError, MappingError, HuggingFaceError,
    ChatTemplateError, TensorFileError, AdapterError, FamilyError, OptionError,
)  # fmt: skip


def _refuse(flags: argparse.Namespace, what: str, *options: str) -> None:
    """Raises OptionError for options that `what` would ignore."""
    for option in options:
        if getattr(flags, option):
            raise OptionError(f"--{option}: has no meaning for {what}; leave it out")


def _export(flags: argparse.Namespace) -> int:
    if flags.like:
        files = families.export_family(
            flags.model, flags.out, flags.like, dict(flags.set), flags.keep_adapters
        )
    else:
        _refuse(flags, "an export without --like", "set")
        files = export.export_model(flags.model, flags.out, flags.keep_adapters)
    print(f"{flags.out}: " + ", ".join(files))
    return 0


def _import(flags: argparse.Namespace) -> int:
    if flags.into:
        _refuse(flags, "the SAM 2 of --into", "adapter", "chat_template", "set")
        for line in sam2_model.add_to_model(flags.source, flags.into, flags.out):
            print(line)
        return 0
    template = epath.Path(flags.chat_template).read_text() if flags.chat_template else None
    if source.is_family(flags.source):
        for line in families.import_family(
            flags.source, flags.out, dict(flags.set), flags.adapter, template
        ):
            print(line)
        return 0
    _refuse(flags, "a source that is no multimodal checkpoint", "set")
    about = export.import_model(flags.source, flags.out, template, flags.adapter)
    print(f"{flags.out}: {about['kind']}, heads {', '.join(about['heads']) or 'none'}")
    for name in about["ignored"]:
        print(f"  left out: {name}")
    return 0


def _check(flags: argparse.Namespace) -> int:
    from tpo_jax.interop import check, check_family, check_language

    if source.is_family(flags.exported):
        differences = check_family.compare_family(flags.model, flags.exported, dict(flags.set))
    else:
        _refuse(flags, "a folder that is no multimodal checkpoint", "set")
        alone = folder.holds_language_only(flags.model)
        compare = check_language.compare_language if alone else check.compare
        differences = compare(flags.model, flags.exported)
    for part, difference in differences.items():
        print(f"{part:24s} {difference:.2e}")
    wrong = [part for part, difference in differences.items() if difference > flags.tolerance]
    if wrong:
        print(f"first difference above {flags.tolerance}: {wrong[0]}", file=sys.stderr)
    return 1 if wrong else 0


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], type=families.option, metavar="OPTION=VALUE",
        help="what config.json of a multimodal checkpoint does not say",
    )  # fmt: skip


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
    command.add_argument(
        "--keep_adapters", action="store_true", help="LoRA in PEFT's layout instead of merged"
    )
    command.add_argument(
        "--like", help="published folder that the model was imported from; writes its layout"
    )
    _add_set(command)
    command.set_defaults(run=_export)
    command = commands.add_parser("import", help="exported or Hugging Face folder -> model folder")
    command.add_argument(
        "--source", required=True, help="folder that `export` wrote, or a Hugging Face folder"
    )
    command.add_argument("--out", required=True, help="model folder to write")
    command.add_argument("--into", help="model folder that gets the SAM 2 of --source")
    command.add_argument("--adapter", help="PEFT folder to merge into the model")
    command.add_argument("--chat_template", help="Jinja file in the place of the source's")
    _add_set(command)
    command.set_defaults(run=_import)
    command = commands.add_parser("check", help="run both sides on the same inputs and compare")
    command.add_argument("--model", required=True, help="model folder")
    command.add_argument(
        "--exported", required=True, type=local_path,
        help="what `export` wrote from it, or the published folder; PyTorch reads local files",
    )
    command.add_argument("--tolerance", type=float, default=2e-4, help="largest difference")
    _add_set(command)
    command.set_defaults(run=_check)
    flags = parser.parse_args()
    try:
        return flags.run(flags)
    except _ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
