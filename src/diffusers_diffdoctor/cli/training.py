# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What `diffdoctor treat` and `train-detector` have in common: the flags of dataclasses, recipes, and where a run goes on."""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import TrlParser

from diffdoctor import suggestion

from ..files import read_yaml
from ..training import RunArguments, RunTrainer
from ..training.checkpoints import check_whole, last_checkpoint


class Parser(TrlParser):
    """Flags of two dataclasses, grouped by where their defaults come from; refuses what it does not know.

    Args:
        script: what a command names beside the arguments of its trainer.
        config: the arguments of its trainer.
        recipes: name -> file of the recipes that come with the package.
        description: of the command, a sentence.
        own_title: over the flags of `script`.
        prog: name of the program in messages.
    """

    GROUPS = {
        "run": "",
        "paper": "settings of the paper (arXiv 2501.12382)",
        "release": "settings of the authors' release",
        "ours": "settings of ours, which the paper leaves open",
        "transformers": "settings of transformers.TrainingArguments",
    }

    def __init__(
        self,
        script: type,
        config: type[RunArguments],
        recipes: Mapping[str, Path],
        description: str,
        own_title: str,
        prog: str | None = None,
    ):
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        self._script, self._config, self._recipes = script, config, recipes
        self._titles = self.GROUPS | {"run": own_title}
        super().__init__(
            (script, config),
            prog=prog,
            usage="%(prog)s --output_dir DIR [--config RECIPE] [--ARGUMENT VALUE ...]",
            description=f"{description} Flags win over the recipe, which wins over the defaults.",
            allow_abbrev=False,
        )
        # `TrlParser` takes it out of the arguments before it parses; here it is for `--help`
        self.add_argument("--config", metavar="RECIPE", help=f"YAML file of arguments, or one of {', '.join(recipes)}")

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        for name, title in self._titles.items():  # in this order, whatever the order of the fields
            if name not in self._groups:
                self._groups[name] = self.add_argument_group(title)
        super()._parse_dataclass_field(self._groups[self._source_of(field)], field)

    def _source_of(self, field: dataclasses.Field) -> str:
        """The group of an argument, by what its help says of the default."""
        if field.name in self._script.__annotations__:
            return "run"
        ours = [kind for kind in self._config.__mro__ if issubclass(kind, RunArguments)]
        given_anew = any(field.name in vars(kind).get("__annotations__", {}) for kind in ours)
        if field.name in TrainingArguments.__dataclass_fields__ and not given_anew:
            return "transformers"
        named = re.search(r"\b(paper|release)\b", field.metadata.get("help", ""))
        return named.group(1) if named else "ours"

    def parse(self, argv: Sequence[str], recipe: str | None = None) -> tuple[Any, Any]:
        """The two dataclasses. Flags win over the recipe, given as `--config` or by default `recipe`, which wins over the
        defaults."""
        argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if "--config" not in argv:
            argv += ["--config", recipe] if recipe is not None else []
        if "--config" in argv:
            position = argv.index("--config") + 1
            if position == len(argv):
                self.error("--config needs a file or the name of a recipe")
            argv[position] = str(check_recipe(find_recipe(argv[position], self._recipes)))
        script, args, _, unknown = self.parse_args_and_config(argv, return_remaining_strings=True)
        if unknown:
            self.error(suggestion(unknown, [option for action in self._actions for option in action.option_strings]))
        return script, args


def recipes_in(folder: Path) -> dict[str, Path]:
    """The recipes of a folder, by name."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str, recipes: Mapping[str, Path]) -> Path:
    """The file of that name, or the recipe of the package.

    Raises:
        FileNotFoundError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name not in recipes:
        raise FileNotFoundError(
            f"`--config {name}` is neither a file nor a recipe of the package: {', '.join(recipes)}."
        )
    return recipes[name]


def check_recipe(path: Path) -> Path:
    """Refuse a file that is no recipe.

    Raises:
        ValueError: it is not YAML, holds something else than arguments, or has an alias. The file is named.
    """
    try:
        read_yaml(path)
    except ValueError as error:
        raise ValueError(f"`--config {path}` is no recipe: {error}") from error
    return path


def resume_point(args: RunArguments, trainer: type[RunTrainer]) -> str | bool | None:
    """What `--resume_from_checkpoint` asks `train` for: a folder, True for the last whole checkpoint, "auto" for that if there
    is one.

    Raises:
        ValueError: it cannot be continued, or a new run would write into the folder of another.
    """
    given = args.resume_from_checkpoint
    if given is None:
        trainer.check_output_dir(args)
    elif str(given).lower() == "auto":
        return "auto"
    elif str(given).lower() == "true":
        last_checkpoint(args.output_dir)
        return True
    elif not Path(given).is_dir():
        raise ValueError(
            f"`--resume_from_checkpoint {given}` is no folder here: name a checkpoint, such as {args.output_dir}/checkpoint-100, "
            "or say `true` for the last whole one of the output folder, or `auto` for that if there is one."
        )
    else:
        check_whole(given)
    return given
