"""The part of a model card that says how a classifier is asked, what its labels are, and when it abstains."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tritune.trainer.config.choices import Form
from tritune.trainer.export.carried import BELOW, MAX_LENGTH, PROMPT, SIDECAR, TOKEN_IDS, fields_of
from tritune.trainer.methods.adapter_io import LABELS

if TYPE_CHECKING:
    from tritune.trainer.export.source import Source

MOST = 200  # labels that are listed


def asking(source: Source, form: Form) -> list[str]:
    """Lines of Python that ask a classifier by token, after `model` and `tokenizer` were loaded; none for any other model."""
    if PROMPT not in fields_of(source):
        return []
    if form is Form.adapter:
        read = [f'labels = json.load(open("{LABELS}"))', f'tokens = json.load(open("{SIDECAR}"))["{TOKEN_IDS}"]']
    else:
        read = [f"labels, tokens = model.config.id2label, model.config.{TOKEN_IDS}"]
    return [
        "",
        *read,
        'turns = [{"role": "user", "content": "..."}]',
        'ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]',
        "probabilities = model(input_ids=ids).logits[0, -1, tokens].softmax(-1)",
        "label = labels[int(probabilities.argmax())]",
    ]


def labels_part(source: Source, form: Form) -> list[str]:
    """Paragraphs; none for a model that is no classifier."""
    if not source.labels:
        return []
    fields, where = fields_of(source), f"`{SIDECAR}`" if form is Form.adapter else "`config.json`"
    parts = ["## Labels"]
    if PROMPT in fields:
        parts += [
            "It reads a text in the prompt below, which the chat template renders from one turn of the user, and answers "
            f"with one token: ask for one (`max_new_tokens=1`). `{TOKEN_IDS}` in {where} has the token of each label; the "
            "likeliest among them is the answer, by which the scores below are counted.",
            _block([json.dumps(fields[PROMPT], ensure_ascii=False)]),
        ]
    elif TOKEN_IDS in fields:
        held = "held a secret, or `***` where one may have stood," if source.read_back else "held a secret"
        parts.append(f"Its prompt {held} and is not written here: whoever asks the model must know it.")
    data = source.config.data
    parts += [
        _block(_lines(source, fields)),
        f"It was trained on at most {data.max_length:,} tokens of a row, `data.overlong={data.overlong}` (`{MAX_LENGTH}` in "
        f"{where}): a longer text is to be cut as in training.",
    ]
    if BELOW in fields:
        parts.append(_abstains(source.facts["abstain"], where))
    return parts


def _lines(source: Source, fields: dict[str, Any]) -> list[str]:
    names = [json.dumps(label, ensure_ascii=False) for label in source.labels]
    tokens = fields.get(TOKEN_IDS, [])
    spelt = [f"{i:>7}  {json.dumps(str(source.tokenizer.decode([i])), ensure_ascii=False)}" for i in tokens]
    lines = [f"{name}  {token}" for name, token in zip(names, spelt, strict=True)] if tokens else names
    more = [f"and {len(lines) - MOST:,} more"] if len(lines) > MOST else []
    return lines[:MOST] + more


def _abstains(abstain: dict[str, Any], where: str) -> str:
    found = [
        f"on {name} it answers {f['coverage']:.1%} of the rows"
        + ("" if f["answered_accuracy"] is None else f" and is right in {f['answered_accuracy']:.1%} of these")
        for name, f in abstain["splits"].items()
    ]
    below, rule = abstain["below"], f"{abstain['target']:.1%} of its answers on the validation split are right"
    if below > 0:
        said = f"Where the likeliest label has a probability below {below:.6g} (`{BELOW}` in {where}), it is meant to abstain"
        return f"{said}. That is the least threshold at which {rule}: {'; '.join(found)}."
    return f"It need not abstain (`{BELOW}` in {where} is 0): {rule} as it is. Of what it answers: {'; '.join(found)}."


def _block(lines: list[str]) -> str:
    """Every line is JSON's or begins with a name in quotes, so that none of them ends the block."""
    return "\n".join(["```text", *lines, "```"])
