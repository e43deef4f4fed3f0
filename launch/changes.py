"""What another configuration means for a run that is there: which stages run anew because of which keys. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from launch.config import Config
from launch.pipeline import Stage
from launch.rundir import VALUES_FILE, read_stages

_MOST_KEYS = 5
_LONGEST_VALUE = 40
_UNSET = "(unset)"


@dataclass(frozen=True, slots=True)
class Earlier:
    """A run as the command before this one left it."""

    values: Mapping[str, Any]
    """Of its configuration, by dotted key."""
    stages: Mapping[str, Path]

    @classmethod
    def read(cls, folder: Path) -> Earlier | None:
        """None where there was none, or its files cannot be read: nothing hangs on them but what is told."""
        try:
            return cls(dict(_flat(json.loads((folder / VALUES_FILE).read_text()))), read_stages(folder))
        except (OSError, ValueError):
            return None


def told_changes(earlier: Earlier | None, config: Config, wanted: Sequence[Stage], kept: Sequence[Stage]) -> str | None:
    """In one line, what is kept and what runs anew, and why; None where no stage that had begun begins again.

    Args:
        earlier: of the same folder.
        config: of this command.
        wanted: its stages.
        kept: those of them that were done before it.
    """
    if earlier is None:
        return None
    anew = [stage for stage in wanted if stage not in kept and _has_another_key(stage, earlier.stages.get(stage.name))]
    if not anew:
        return None
    keys = list(_changed(earlier.values, config))
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    why = ", ".join(keys[:_MOST_KEYS]) + more if keys else "files that the configuration names, or the program"
    stays = f"; kept: {_names(kept, wanted)}" if kept else ""
    return f"changed since the last run here: {why}. Runs anew: {_names(anew, wanted)}{stays}. Nothing made before is deleted."


def _has_another_key(stage: Stage, before: Path | None) -> bool:
    return before is not None and before.name != stage.folder.name and before.is_dir()


def _names(some: Sequence[Stage], every: Sequence[Stage]) -> str:
    """A kind of which all are meant, and more than one, is named once."""
    found: dict[str, None] = {}
    for stage in some:
        alike = [other for other in every if other.kind == stage.kind]
        found[f"{stage.kind}.*" if len(alike) > 1 and all(other in some for other in alike) else stage.name] = None
    return ", ".join(found)


def _changed(before: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Each key that a result may hang on, with what it was and is."""
    now, ignored = dict(_flat(config.model_dump(mode="json"))), tuple(_without_effect(config))
    for key in dict.fromkeys([*now, *before]):
        old, new = (_short(values[key]) if key in values else _UNSET for values in (before, now))
        if old != new and not f"{key}.".startswith(ignored):
            yield f"{key} {old} -> {new}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _without_effect(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Keys that are no part of any stage's key, each with a dot behind it."""
    for name, field in type(section).model_fields.items():
        extra, value = field.json_schema_extra, getattr(section, name)
        if isinstance(extra, dict) and extra.get("hashed") is False:
            yield f"{prefix}{name}."
        elif isinstance(value, BaseModel):
            yield from _without_effect(value, f"{prefix}{name}.")
