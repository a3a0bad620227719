"""What every configuration and specification is made of: strict models, and one-line errors. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class UserError(Exception):
    """Something that the user can mend: one line that says what was wrong, what was expected, what to do."""


class RunError(Exception):
    """The settings were right and the work failed all the same: one line, exit status 1."""


class NotFiniteError(RunError):
    """The loss or a weight is not finite."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean …?"` for the known word that looks most like `word`, or nothing where none does."""
    by_lower = {each.lower(): each for each in sorted(known, key=lambda each: (len(each), each))}
    lower = word.lower().replace("-", "_")
    parts = [each for each in by_lower if each.rpartition(".")[2] == lower]  # of a key, its last word
    begun = [each for each in by_lower if len(lower) > 2 and each.startswith(lower)]
    close = parts or begun or difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.55)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


# What moves a terminal's cursor, changes its colours, or turns the order of letters round.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
ONE_LINE = "^[^\x00-\x1f\x7f]*$"  # the name of a class, which tables show
PASSWORD = re.compile(r"(?<=://)([^\s:/@]*):[^\n'\"]*@")
SECRET = re.compile(r"(?i)([?&]\w*(passw|pwd|secret|token)\w*=)[^\s&'\"]+")


def printable(text: str) -> str:
    """Text as a terminal may show it: names come from strangers, so control characters but tabs and line breaks are
    escapes; addresses are without their passwords."""
    text = SECRET.sub(r"\1…", PASSWORD.sub(r"\1@", text))
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def explain(error: ValidationError, within: str = "") -> str:
    """The first of pydantic's findings as one line in the words of the command line."""
    finding = error.errors()[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in finding["loc"])
    key = (within + key).lstrip(".")
    if finding["type"] == "missing":
        return f"{key} is missing"
    if finding["type"] in ("string_too_short", "too_short"):
        return f"{key} is empty"
    if finding["type"] == "string_unicode":
        return f"{key}={finding['input']!r}: the name is no UTF-8; rename it, or name its folder"
    message = finding["msg"].removeprefix("Value error, ")
    if not finding["msg"].startswith("Input should"):
        return message if key == "" or message.startswith(("architecture", key)) else f"{key}: {message}"
    return f"{key}={finding['input']!r:.300}: must be {message.removeprefix('Input should be ')}"


class Strict(BaseModel):
    """No unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    known = nearest(str(key), cls.model_fields) or f"; known here: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {key}{known}")
        return value


NonEmpty = Annotated[str, Field(min_length=1)]
Schema = TypeVar("Schema", bound=Strict)


def validated(schema: type[Schema], config: Mapping[str, Any]) -> Schema:
    """`config` as `schema`, or a UserError that names the key, the value and what was expected."""
    try:
        return schema.model_validate(dict(config))
    except ValidationError as error:
        raise UserError(explain(error)) from None
