"""`make demo`: train a tiny model from scratch on generated rows and show base against tuned. Needs nothing but the checkout.

Rows are support messages in four categories, written from templates; those of the test split use templates that the
training rows do not.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

OPENINGS = ["Hello,", "Hi there,", "Good morning,", "Hey,", "Sorry to bother you,", "Quick question:"]
CLOSINGS = ["Thanks.", "Can you help?", "Please look into it.", "Kind regards.", "What should I do?"]
TEMPLATES = {
    "refund": [
        "I want my money back for the {thing}",
        "please refund the {thing} I bought",
        "the {thing} broke, return the payment",
        "I would like a refund, the {thing} does not work",
    ],
    "delivery": [
        "my {thing} has not arrived yet",
        "where is the parcel with my {thing}",
        "the {thing} was shipped, still not here",
        "the courier never delivered the {thing}, where is the parcel",
    ],
    "account": [
        "I cannot log in to see my {thing}",
        "reset my password, I ordered a {thing}",
        "my login stopped working after the {thing}",
        "the password for the {thing} page does not log me in",
    ],
    "praise": [
        "I love the new {thing}, great work",
        "the {thing} is wonderful, well done",
        "great {thing}, my family is happy",
        "wonderful service, we love the {thing}",
    ],
}
THINGS = ["lamp", "chair", "phone case", "kettle", "backpack", "desk", "watch", "blender", "rug", "camera"]


def write(path: Path, templates: slice, seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for label, texts in TEMPLATES.items():
        for text, thing, opening in itertools.product(texts[templates], THINGS, OPENINGS):
            message = f"{opening} {text.format(thing=thing)}. {rng.choice(CLOSINGS)}"
            rows.append({"text": message, "label": label})
    rng.shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    from tritune.launch.cli import main as tritune

    folder = Path("runs/demo")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", slice(0, 3), seed=0)
    write(folder / "test.jsonl", slice(3, 4), seed=1)
    arguments = ["train", "experiment=demo", f"data.train={folder}/train.jsonl", f"data.test={folder}/test.jsonl"]
    print("tritune " + " ".join(arguments), flush=True)
    return tritune([*arguments, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
