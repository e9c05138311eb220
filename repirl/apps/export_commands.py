"""`repirl export` and its options. Whatever takes seconds to import waits until it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from repirl.apps.commands import refuse_overrides
from repirl.config import ConfigError


def add_export_commands(commands: Any) -> None:
    """commands: the parser's subparsers."""
    command = commands.add_parser(
        "export", help="write policy and PRM as plain Hugging Face models", allow_abbrev=False
    )
    command.add_argument("--checkpoint", metavar="DIR", required=True, help="a run's folder or a step_N folder")
    command.add_argument("--output", metavar="DIR", required=True, help="gets policy/ and prm/")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as they were trained"
    )
    command.add_argument(
        "--adapter-only",
        action="store_true",
        help="of a run with adapters: write them alone, for peft, not merged into their base",
    )
    command.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="then upload to the private repositories OWNER/NAME-policy and OWNER/NAME-prm",
    )
    command.add_argument("--public", action="store_true", help="with --push-to-hub: everybody may read them")
    command.set_defaults(run=_export)


def _export(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    name = options.push_to_hub
    if options.public and name is None:
        raise ConfigError("--public is about --push-to-hub OWNER/NAME: give both")
    import torch

    from repirl.export import export_checkpoint
    from repirl.hub import check_push, push

    if name is not None:
        check_push(name)
    folders = export_checkpoint(
        options.checkpoint,
        Path(options.output),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        adapter_only=options.adapter_only,
        hub=name,
    )
    for folder in folders:
        print(folder)
    if name is not None:
        for url in push(folders, name, public=options.public):
            print(f"{url} ({'public' if options.public else 'private'})")
    return 0
