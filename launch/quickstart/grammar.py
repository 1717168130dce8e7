"""Support messages and their answers: hand-written templates, filled by a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tritune.launch.quickstart.messages import MESSAGES

CATEGORIES = list(MESSAGES)
SPLITS = {"train": 2400, "validation": 160, "test": 400}  # rows; equally many of each category

ITEMS = [
    "lamp",
    "chair",
    "kettle",
    "backpack",
    "desk",
    "watch",
    "blender",
    "rug",
    "camera",
    "toaster",
    "clock",
    "jacket",
    "mirror",
    "radio",
    "sofa",
    "tent",
    "scarf",
    "vase",
    "guitar",
    "helmet",
    "printer",
    "pillow",
    "ladder",
    "bicycle",
    "drill",
    "keyboard",
    "teapot",
    "suitcase",
    "blanket",
    "bookcase",
    "stove",
    "wallet",
    "mattress",
    "telescope",
]
NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ivy",
    "Jack",
    "Kate",
    "Leo",
    "Maria",
    "Nina",
    "Oscar",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
]
TOWNS = ["Ashford", "Bristol", "Carlow", "Derby", "Exeter", "Hilltown", "Kendal", "Milton", "Oakham", "Redhill"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]

OPENINGS = ["Hello!", "Hi there!", "Good morning!", "Hey!", "Dear team!", "Sorry to bother you.", "A short question."]
ASIDES = [
    "My order number is {number}.",
    "I ordered it on {day}.",
    "It is order {number}.",
    "I wrote to you on {day} already.",
    "I bought it last month.",
    "I am writing from my phone.",
]
CLOSINGS = ["Thanks.", "Thank you, {name}", "Best wishes, {name}", "Kind regards, {name}", "Many thanks in advance."]
REPLIES = {
    "refund": "We will give you your money back for the {item}.",
    "delivery": "We will ask the courier where the {item} is.",
    "account": "We will help you to log in and see the {item}.",
    "praise": "We are glad that you like the {item}.",
    "cancel": "We will stop the order of the {item}.",
    "invoice": "We will send you the bill for the {item}.",
    "defect": "We will repair or exchange the {item}.",
    "address": "We will send the {item} to the new address.",
}


def fill(text: str, rng: random.Random, item: str) -> str:
    """Put a thing from the shop, and names, towns, days and numbers drawn from `rng`, into a template."""
    return text.format(
        item=item, name=rng.choice(NAMES), town=rng.choice(TOWNS), day=rng.choice(DAYS), number=rng.randint(10, 9999)
    )


def message(template: str, rng: random.Random, item: str) -> str:
    """Return what a customer writes: most have an opening or a closing, some say something beside the point."""
    parts = [template]
    if rng.random() < 0.6:
        parts.insert(0, rng.choice(OPENINGS))
    if rng.random() < 0.4:
        parts.append(rng.choice(ASIDES))
    if rng.random() < 0.6:
        parts.append(rng.choice(CLOSINGS))
    return fill(" ".join(parts), rng, item)


def rows(split: str, seed: int) -> Iterator[dict[str, str]]:
    """Yield `{"prompt": message, "response": "<category>\\n<reply>"}`, each message once, in an order without pattern.

    Every template of the split is used equally often, to within one.
    """
    rng = random.Random(f"{split} {seed}")  # a string seeds by its SHA-512, so equal over processes and versions
    found: dict[str, dict[str, str]] = {}
    for category in CATEGORIES:
        templates, share = MESSAGES[category][split], SPLITS[split] // len(CATEGORIES)
        wanted = len(found) + share
        while len(found) < wanted:
            item = rng.choice(ITEMS)
            text = message(templates[len(found) % share % len(templates)], rng, item)
            reply = REPLIES[category].format(item=item)
            found.setdefault(text, {"prompt": text, "response": f"{category}\n{reply}"})
    shuffled = list(found.values())
    rng.shuffle(shuffled)
    yield from shuffled
