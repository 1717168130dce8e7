"""Words of Hydra's command line, written and read by its own grammar: names may hold quotes, backslashes and any letter."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def override(key: str, value: str) -> str:
    """`key=value` that Hydra reads back as exactly this value; in quotes only where it needs them."""
    bare = f"{key}={value}"
    if value_of(bare) == value:
        return bare
    return f"{key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"


def value_of(word: str) -> str | None:
    """The text that an override gives its key; None where Hydra cannot read it, which it says itself when it composes."""
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException:
        return None
    return value.text if isinstance(value, QuotedString) else None if value is None else str(value)
