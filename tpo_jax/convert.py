"""Moves models between this program and PyTorch.

python -m tpo_jax.convert export --model=runs/demo/dpo/model --out=exported
python -m tpo_jax.convert import --source=exported --out=model
python -m tpo_jax.convert import --source=Qwen2-7B --out=qwen2   (a Hugging Face folder)
python -m tpo_jax.convert import --source=LongVA-7B --out=longva --set conv_template=qwen_1_5
python -m tpo_jax.convert import --source=sam2.1-hiera-large --into=model --out=model2
python -m tpo_jax.convert import --source=siglip2-so400m-patch16-naflex --into=qwen3 --out=model
python -m tpo_jax.convert export --model=longva --out=exported --like=LongVA-7B
python -m tpo_jax.convert export --model=model2 --out=exported --like=sam2.1-hiera-large
python -m tpo_jax.convert export --model=onevision --out=exported --like=ONEVISION --like=SAM2
python -m tpo_jax.convert check  --model=model --exported=exported   (needs torch, transformers)
python -m tpo_jax.convert check  --model=longva --exported=LongVA-7B
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from tpo_jax.data.files import local_path, read_text
from tpo_jax.errors import MissingFile, Parser, UserError, report
from tpo_jax.interop import export, folder, precision, sam2, sam2_model, siglip
from tpo_jax.interop.families import folder as families
from tpo_jax.interop.families import source
from tpo_jax.models.heads.listed import load_listed

EXPORT_EXAMPLES = """examples:
  python -m tpo_jax.convert export --model=runs/demo/dpo/model --out=exported
  # adapters apart, in PEFT's layout
  python -m tpo_jax.convert export --model=tuned --out=exported --keep_adapters
  # back into the layout of a multimodal family that was imported
  python -m tpo_jax.convert export --model=longva --out=exported --like=LongVA-7B
  # trained in float32, as small as it was published
  python -m tpo_jax.convert export --model=longva --out=exported --like=LongVA-7B --dtype=bfloat16
  # a model with the head sam2, its network as `transformers` has it; one of a family likewise
  python -m tpo_jax.convert export --model=tuned --out=exported --like=sam2.1-hiera-large
  python -m tpo_jax.convert export --model=tuned --out=exported \
      --like=llava-onevision-qwen2-7b-ov-hf --like=sam2.1-hiera-large
"""
IMPORT_EXAMPLES = """examples:
  # what `export` wrote, a Hugging Face language model, a multimodal family (docs/families.md)
  python -m tpo_jax.convert import --source=exported --out=model
  python -m tpo_jax.convert import --source=Qwen2-7B --out=qwen2
  python -m tpo_jax.convert import --source=LongVA-7B --out=longva --set conv_template=qwen_1_5
  # with a PEFT adapter merged, or kept apart; the mask network of SAM 2 into a model that has one
  python -m tpo_jax.convert import --source=Qwen2-7B --adapter=tuned --out=qwen2
  python -m tpo_jax.convert import --source=LongVA-7B --out=longva --set conv_template=qwen_1_5 \
      --adapter=tuned --keep_adapters
  python -m tpo_jax.convert import --source=sam2.1-hiera-large --into=model --out=model2
  # the tower of SigLIP 2 into a language folder
  python -m tpo_jax.convert import --source=siglip2-so400m-patch16-naflex --into=qwen3 --out=parts
"""
CHECK_EXAMPLES = """examples:
  python -m tpo_jax.convert check --model=model --exported=exported
  python -m tpo_jax.convert check --model=longva --exported=LongVA-7B --tolerance=1e-3

Needs torch and transformers. The exit status is 1 where a part differs by more.
"""


class OptionError(UserError):
    """An option that means nothing for what it was given with; the message names both."""


def _refuse(flags: argparse.Namespace, what: str, *options: str) -> None:
    """Raises OptionError for options that `what` would ignore."""
    for option in options:
        if getattr(flags, option):
            raise OptionError(f"--{option}: has no meaning for {what}; leave it out")


def _export(flags: argparse.Namespace) -> int:
    like, network = _likes(flags.like)
    if like and siglip.is_tower(like):
        _refuse(flags, "a model of two parts", "set", "keep_adapters")
        _refuse_checkpoint(flags, "a model of two parts")
        files = siglip.export_parts(flags.model, flags.out, like, network, flags.dtype)
    elif like:
        files = families.export_family(
            flags.model, flags.out, like, dict(flags.set), flags.keep_adapters, network, flags.dtype
        )
    else:
        _refuse(flags, "an export without --like of a published model", "set")
        _refuse_checkpoint(flags, "an export without --like of a published model")
        files = export.export_model(
            flags.model, flags.out, flags.keep_adapters, network, flags.dtype
        )
    print(f"{flags.out}: " + ", ".join(files))
    return 0


def _refuse_checkpoint(flags: argparse.Namespace, what: str) -> None:
    if flags.dtype == precision.CHECKPOINT:
        raise OptionError(
            f"--dtype={flags.dtype}: has no meaning for {what}; use one of "
            f"{', '.join(precision.DTYPES)}"
        )


def _likes(folders: Sequence[str]) -> tuple[str | None, str | None]:
    """(published folder of the model, that of its SAM 2), as many of the two as were given."""
    networks = [like for like in folders if sam2.is_sam2(like)]
    models = [like for like in folders if like not in networks]
    for kind, found in (("a published model", models), ("SAM 2", networks)):
        if len(found) > 1:
            raise OptionError(f"--like: {', '.join(found)}: expected at most one folder of {kind}")
    return next(iter(models), None), next(iter(networks), None)


def _import(flags: argparse.Namespace) -> int:
    if flags.into:
        _refuse(flags, "--into", "adapter", "keep_adapters", "chat_template", "set")
        add = siglip.add_to_language if siglip.is_tower(flags.source) else sam2_model.add_to_model
        for line in add(flags.source, flags.into, flags.out):
            print(line)
        return 0
    if not flags.adapter:
        _refuse(flags, "an import without --adapter", "keep_adapters")
    if siglip.is_parts(flags.source):
        _refuse(flags, "a model of two parts", "adapter", "chat_template", "set")
        for line in siglip.import_parts(flags.source, flags.out):
            print(line)
        return 0
    template = read_text(flags.chat_template, "--chat_template") if flags.chat_template else None
    if source.is_family(flags.source):
        for line in families.import_family(
            flags.source, flags.out, dict(flags.set), flags.adapter, template, flags.keep_adapters
        ):
            print(line)
        return 0
    _refuse(flags, "a source that is no multimodal checkpoint", "set")
    about = export.import_model(
        flags.source, flags.out, template, flags.adapter, flags.keep_adapters
    )
    print(f"{flags.out}: {about['kind']}, heads {', '.join(about['heads']) or 'none'}")
    for name in about["ignored"]:
        print(f"  left out: {name}")
    return 0


def _check(flags: argparse.Namespace) -> int:
    from tpo_jax.interop import check, check_family, check_language

    notes: list[str] = []
    family = source.is_family(flags.exported)
    if family or siglip.is_parts(flags.exported):
        if family:
            found = check_family.compare_family(flags.model, flags.exported, dict(flags.set))
        else:
            _refuse(flags, "a model of two parts", "set")
            found = check_family.compare_parts(flags.model, flags.exported)
        differences = found.differences
        notes = [f"compared: {part}, with {theirs}" for part, theirs in found.parts.items()]
        notes.append("not compared (glue): " + "; ".join(found.glue))
    else:
        _refuse(flags, "a folder that is no multimodal checkpoint", "set")
        alone = folder.holds_language_only(flags.model)
        written = epath.Path(flags.exported) / ("config.json" if alone else "tpo_torch.py")
        if not written.exists():
            raise MissingFile(
                f"{written}: missing, so {flags.exported} is not what `convert export` writes from "
                f"{flags.model}; export it"
            )
        compare = check_language.compare_language if alone else check.compare
        differences = compare(flags.model, flags.exported)
        if not alone:
            notes = [f"not compared: head {name}, which tpo_torch.py does not run"
                     for name in check.not_run(flags.model)]  # fmt: skip
    width = max(map(len, differences))
    for part, difference in differences.items():
        print(f"{part:{width}s}  {difference:.2e}")
    for note in notes:
        print(note)
    wrong = [part for part, difference in differences.items() if difference > flags.tolerance]
    if wrong:
        print(f"first difference above {flags.tolerance}: {wrong[0]}", file=sys.stderr)
    return 1 if wrong else 0


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], type=families.option, metavar="OPTION=VALUE",
        help="what config.json of a multimodal checkpoint does not say",
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tpo_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    _add_export(commands)
    _add_import(commands)
    _add_check(commands)
    return parser


def _add_export(commands: Any) -> None:
    command = _add(
        commands, "export", EXPORT_EXAMPLES, "model folder -> Hugging Face and PyTorch files"
    )
    command.add_argument("--model", required=True, help="model folder")
    command.add_argument(
        "--out", required=True,
        help="folder to write; in place of an earlier export, not of another folder",
    )  # fmt: skip
    command.add_argument(
        "--keep_adapters", action="store_true", help="LoRA in PEFT's layout instead of merged"
    )
    command.add_argument(
        "--like",
        action="append",
        default=[],
        help="published folder that the model was imported from, whose layout is written; once "
        "more for the SAM 2 in it",
    )
    command.add_argument(
        "--dtype", choices=[*precision.DTYPES, precision.CHECKPOINT],
        help="of the weights, which are otherwise as the model has them, after training float32; "
        "checkpoint: that of every tensor of --like",
    )  # fmt: skip
    _add_set(command)
    command.set_defaults(run=_export)


def _add_import(commands: Any) -> None:
    command = _add(
        commands, "import", IMPORT_EXAMPLES, "exported or Hugging Face folder -> model folder"
    )
    command.add_argument(
        "--source", required=True, help="folder that `export` wrote, or a Hugging Face folder"
    )
    command.add_argument(
        "--out", required=True,
        help="model folder to write; in place of an earlier one, not of another folder",
    )  # fmt: skip
    command.add_argument(
        "--into",
        help="model folder that gets the SAM 2 of --source, or language folder for its SigLIP",
    )
    command.add_argument("--adapter", help="PEFT folder to merge into the model")
    command.add_argument(
        "--keep_adapters", action="store_true",
        help="--adapter as parameters of its own instead, to train on",
    )  # fmt: skip
    command.add_argument("--chat_template", help="Jinja file in the place of the source's")
    _add_set(command)
    command.set_defaults(run=_import)


def _add_check(commands: Any) -> None:
    command = _add(
        commands, "check", CHECK_EXAMPLES, "run both sides on the same inputs and compare"
    )
    command.add_argument("--model", required=True, help="model folder")
    command.add_argument(
        "--exported",
        required=True,
        type=local_path,
        help="what `export` wrote from it, or the published folder; PyTorch reads local files",
    )
    command.add_argument("--tolerance", type=float, default=2e-4, help="largest difference")
    _add_set(command)
    command.set_defaults(run=_check)


def _add(commands: Any, name: str, examples: str, what: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    load_listed()
    flags = _parser().parse_args(arguments)
    try:
        return flags.run(flags)
    except UserError as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
