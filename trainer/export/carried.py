"""What an export of a classifier says of itself, so that nobody has to be told: its labels, its prompt, where a text is cut,
when it abstains.

In a whole model's `config.json`, where transformers keeps fields that it does not know; beside an adapter, which has none, in
`labels.json` and `tritune.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from tritune.trainer.config import ObjectiveConfig
from tritune.trainer.config.choices import Overlong
from tritune.trainer.data.label_prompt import TEXT, is_secret
from tritune.trainer.errors import InputError, reason
from tritune.trainer.methods.adapter_io import LABELS
from tritune.trainer.model.folder import read_settings_file
from tritune.trainer.shown import bounded

if TYPE_CHECKING:
    from tritune.trainer.export.source import Source

SIDECAR = "tritune.json"
PROMPT, TOKEN_IDS, BELOW = "tritune_prompt", "tritune_label_token_ids", "tritune_abstain_below"
MAX_LENGTH, OVERLONG = "tritune_max_length", "tritune_overlong"
_FIELDS = (PROMPT, TOKEN_IDS, BELOW, MAX_LENGTH, OVERLONG)
_REMEDY = "Mend the file, or export the model again from its run"
_GIVE = "Give data.labels=[...] in the order of the outputs"


@dataclass(frozen=True)
class Carried:
    """What an export says of the classifier in it; empty of any other model.

    Attributes:
        labels: in the order of the outputs, or of the label tokens.
        prompt: `objective.prompt` of a classifier by token; None of any other, and where it held a secret.
        token_ids: its label tokens.
        below: the probability below which it abstains.
        max_length, overlong: `data.max_length` and `data.overlong` of its training; None in an export of an older version.
    """

    labels: list[str] = field(default_factory=list)
    prompt: str | None = None
    token_ids: list[int] = field(default_factory=list)
    below: float | None = None
    max_length: int | None = None
    overlong: Overlong | None = None

    def require_tokens(
        self, objective: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase, value: str
    ) -> None:  # fmt: skip
        """Refuse a tokenizer for which `objective` names other label tokens than those that were trained.

        Raises:
            InputError: it does.
        """
        if self.token_ids and objective.label_tokens(self.labels, tokenizer) != self.token_ids:
            rule = f"its {TOKEN_IDS} are not those that this tokenizer has for {', '.join(self.labels[:5])}"
            raise InputError(value, rule, "Leave out data.labels and model.tokenizer, or export it again from its run")


NOTHING = Carried()


def fields_of(source: Source) -> dict[str, Any]:
    """The fields of ours for this model; none where it is no classifier."""
    if not source.labels:
        return {}
    data = source.config.data
    fields: dict[str, Any] = {MAX_LENGTH: data.max_length, OVERLONG: data.overlong.value}
    objective = source.config.objective
    if objective.label_prompt is not None:
        if not is_secret(objective.label_prompt, source.read_back):
            fields[PROMPT] = objective.label_prompt
        fields[TOKEN_IDS] = objective.label_tokens(source.labels, source.tokenizer)
    if source.abstain_below is not None:
        fields[BELOW] = source.abstain_below
    return fields


def in_config(settings: dict[str, Any], source: Source) -> dict[str, Any]:
    """`config.json` with what the model says of itself, and without what its base said there."""
    kept = {key: value for key, value in settings.items() if key not in _FIELDS}
    if TOKEN_IDS in settings and not source.heads:  # these went with it
        kept.pop("id2label", None)
        kept.pop("label2id", None)
    fields = fields_of(source)
    if TOKEN_IDS in fields:
        kept["id2label"] = {str(i): label for i, label in enumerate(source.labels)}
        kept["label2id"] = {label: i for i, label in enumerate(source.labels)}
    return kept | fields


def write_beside(directory: Path, source: Source) -> None:
    """The files beside an adapter; none where there is nothing to say."""
    if source.labels:
        (directory / LABELS).write_text(json.dumps(source.labels, ensure_ascii=False) + "\n")
    if fields := fields_of(source):
        (directory / SIDECAR).write_text(json.dumps(fields, ensure_ascii=False, indent=2) + "\n")


def of_config(config: Any, value: str, given: list[str]) -> Carried:
    """What a whole model's config, as transformers read it, says.

    Args:
        value: what the user gave, for messages.
        given: `data.labels`, in place of its own.

    Raises:
        InputError: a field holds something else.
    """
    fields = {name: getattr(config, name) for name in _FIELDS if getattr(config, name, None) is not None}
    if not fields:
        return NOTHING
    named: Mapping[Any, str] = config.id2label or {}
    return _checked(given or [str(named[i]) for i in sorted(named)], fields, value)


def of_adapter(folder: Path, value: str, given: list[str]) -> Carried:
    """What the files beside an adapter say.

    Args:
        given: `data.labels`, in place of those.

    Raises:
        InputError: they do not read.
    """
    labels: Any = given
    if not given and (folder / LABELS).is_file():
        try:
            labels = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(value, f"its {LABELS} does not read ({reason(error)})", _GIVE) from None
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise InputError(value, f"its {LABELS} is no list of names", _GIVE)
    fields = read_settings_file(folder / SIDECAR, value) if (folder / SIDECAR).is_file() else {}
    return _checked(labels, fields, value)


def _checked(labels: list[str], fields: Mapping[str, Any], value: str) -> Carried:
    prompt, token_ids, below, max_length, overlong = (fields.get(name) for name in _FIELDS)

    def require(holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise InputError(value, f"its {name} is {bounded(str(fields.get(name)), 60)}, and {rule}", _REMEDY)

    require(prompt is None or (isinstance(prompt, str) and TEXT in prompt), PROMPT, f"a prompt has {TEXT} in it")
    are_ids = isinstance(token_ids, list) and all(type(i) is int for i in token_ids)
    rule = f"there is one for each of the {len(labels)} labels"
    by_token = prompt is not None or token_ids is not None  # a prompt that held a secret is not written
    require(not by_token or (are_ids and len(token_ids or []) == len(labels) > 1), TOKEN_IDS, rule)
    require(below is None or (type(below) in (int, float) and 0 <= below <= 1), BELOW, "a probability is from 0 to 1")
    rule = "a text has at least 2 tokens, and their number is whole"
    require(max_length is None or (type(max_length) is int and max_length >= 2), MAX_LENGTH, rule)
    known = [choice.value for choice in Overlong]
    require(overlong is None or overlong in known, OVERLONG, f"it is one of {', '.join(known)}")
    cuts = None if overlong is None else Overlong(overlong)
    return Carried(labels, prompt, list(token_ids or []), below, max_length, cuts)
