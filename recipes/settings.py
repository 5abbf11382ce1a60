"""One YAML file a stage → one frozen pydantic model; ``--set key=value`` changes a single key."""

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings of a stage: frozen, and an unknown key is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


def override(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree with dotted keys changed: ``{"a.b": 1}`` sets b of a."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree


def load(kind: type[S], path: Path, changes: Sequence[str] = ()) -> S:
    """Reads ``path`` as ``kind`` with ``changes`` (``a.b=value``, values in YAML) applied on top.

    Raises:
        ValueError: a change is not of the form ``key=value``.
        pydantic.ValidationError: a key is unknown or a value is out of range.
    """
    tree = yaml.safe_load(path.read_text()) or {}
    for change in changes:
        key, separator, value = change.partition("=")
        if not separator:
            raise ValueError(f"expected key=value, got {change!r}")
        tree = override(tree, {key: yaml.safe_load(value)})
    return kind.model_validate(tree)


def from_arguments(
    kind: type[S], stage: str, description: str, *, switches: Sequence[str] = ()
) -> S:
    """Parses ``--config FILE`` (default: the stage's own YAML) and any number of ``--set k=v``.

    ``--NAME`` of a switch is short for ``--set NAME=true``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m recipes.{stage}", description=description)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name(f"{stage}.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    for name in switches:
        parser.add_argument(
            f"--{name}", action="append_const", dest="changes", const=f"{name}=true"
        )
    arguments = parser.parse_args()
    return load(kind, arguments.config, arguments.changes)
