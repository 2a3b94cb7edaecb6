"""The base class of every section of a recipe, and readable messages for validation errors."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A section of a recipe: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def describe_problems(section_type: type[Section], error: ValidationError) -> list[tuple[str, str]]:
    """The problems of values that failed validation.

    Args:
        section_type: The type that the values were validated against.
        error: From `section_type.model_validate`.

    Returns:
        For each problem the dotted key ("" if it concerns several keys), and a sentence that starts with it.
    """
    problems = []
    for problem in error.errors():
        keys, section = _resolve(section_type, [str(key) for key in problem["loc"]])
        name = ".".join(keys)
        problems.append((name, _sentence(name, section, problem)))
    return problems


def _resolve(section_type: type[Section], location: list[str]) -> tuple[list[str], type[Section] | None]:
    """The keys of a location as in the recipe, and the type of the section that holds the last one.

    If a section is a union of types, pydantic's location has the type's tag after the key.
    """
    keys: list[str] = []
    current: Any = section_type
    holder: type[Section] | None = section_type
    for step in location:
        members = _members(current)
        if members:
            current = next((kind for tag, kind in members.items() if tag == step), None)
            continue
        holder = current if isinstance(current, type) and issubclass(current, Section) else None
        keys.append(step)
        field = holder.model_fields.get(step) if holder is not None else None
        current = None if field is None else field.annotation
    return keys, holder


def _members(annotation: Any) -> dict[str, type[Section]]:
    """The section types of a union discriminated by the field `source`."""
    members: dict[str, type[Section]] = {}
    for kind in get_args(annotation):
        if isinstance(kind, type) and issubclass(kind, Section) and "source" in kind.model_fields:
            members |= {str(tag): kind for tag in get_args(kind.model_fields["source"].annotation)}
    return members


def _sentence(name: str, holder: type[Section] | None, problem: Any) -> str:
    kind = problem["type"]
    if kind == "missing":
        return f"{name}: missing"
    if kind == "value_error":  # raised by one of our own validators, which names the key itself
        return ": ".join([*([name] if name else []), str(problem["ctx"]["error"])])
    if kind == "union_tag_invalid":
        return (
            f"{name}.source: no source {problem['ctx']['tag']!r}; expected one of "
            + (problem["ctx"]["expected_tags"])
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{name}: expected keys and their values, got {problem['input']!r}"
    if kind != "extra_forbidden" or holder is None:
        return f"{name}: {problem['msg']}, got {problem['input']!r}"
    allowed = list(holder.model_fields)
    close = difflib.get_close_matches(name.rpartition(".")[2], allowed, n=3)
    return f"{name}: no such key; " + (
        f"did you mean {' or '.join(map(repr, close))}?" if close else f"expected one of {', '.join(allowed)}"
    )
