"""The tokenizer of an export, read back before it counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from tritune.trainer.data.label_prompt import is_secret
from tritune.trainer.data.prompts import name_rendering
from tritune.trainer.errors import InputError, reason
from tritune.trainer.export.source import Source

PROBE_TEXT = "It's 3 o'clock.\n\tNaïve 漢字 🙂 <|im_start|>user  x_1 = {}"


def write_tokenizer(directory: Path, source: Source, say: Callable[[str], None]) -> None:
    """Write the tokenizer with the template that was trained on, and read it back.

    Raises:
        InputError: it comes back as another one, and `export.insist` does not take it so.
    """
    config, tokenizer = source.config, source.tokenizer
    template = tokenizer.chat_template
    exact = name_rendering(tokenizer, config.objective, source.read_back)
    try:
        tokenizer.save_pretrained(directory)
        changed = changed_tokenizer(directory, tokenizer)
    finally:
        tokenizer.chat_template = template
    if changed is not None and not config.export.insist:
        rule = f"saved and read back, it is not the tokenizer that the run trains with: {changed}"
        remedy = "Save its fast form with transformers first, or take it as it is with export.insist=true"
        raise InputError(f"model.tokenizer={config.model.tokenizer or config.model.path}", rule, remedy)
    prompt = config.objective.label_prompt
    if prompt is not None and is_secret(prompt, source.read_back):
        known = (
            "holds *** in the run's config.yaml, perhaps in a secret's place" if source.read_back else "holds a secret"
        )
        say(f"export    objective.prompt {known}: it is not written, and whoever asks must know it")
        if source.read_back:
            say(
                "export    where no secret was in it, export again with objective.prompt=... as it was given to the run"
            )
    if not exact:
        say("export    its chat template renders the prompt, in other tokens than those of training: the tokenizer tells a "
            "text after its first token from a text at the start")  # fmt: skip
    if changed is not None:
        say(f"export    the tokenizer comes back as another one, and is written as it is (export.insist): {changed}")


def changed_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Read back the tokenizer of `directory`; return in what it is another than `tokenizer`, or None."""
    try:
        read = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # noqa: BLE001  whatever a file that is not right makes the libraries raise
        return f"it does not load ({reason(error)})"
    before, after = tokenizer.get_vocab(), read.get_vocab()  # once each: at 262,144 tokens every call is a second
    if before != after:
        changed = sorted((t for t in {*before, *after} if before.get(t) != after.get(t)), key=str)
        return f"{len(changed)} tokens have other ids, {changed[:3]}"
    if read(PROBE_TEXT)["input_ids"] != tokenizer(PROBE_TEXT)["input_ids"]:
        return "it splits text otherwise"
    return None if read.chat_template == tokenizer.chat_template else "its chat template is another"
