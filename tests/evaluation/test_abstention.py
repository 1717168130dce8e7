"""When a classifier abstains: what ranks know together, what the summary says, and which threshold a reader gets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from harness import Rows
from tritune.launch.cli import main as cli
from tritune.trainer.config.compose import load_config
from tritune.trainer.errors import ConfigFaults
from tritune.trainer.evaluation.abstention import outcomes, settle, threshold_of_run, told
from tritune.trainer.evaluation.predictions import Recorder
from tritune.trainer.objectives.classes import Classes


class Rank:
    """A backend of one rank that adds what the other one has."""

    device = torch.device("cpu")

    def __init__(self, others: torch.Tensor | float = 0.0) -> None:
        self.others, self.mine = others, torch.zeros(0)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.mine = tensor
        return tensor + self.others


def test_outcomes_are_of_all_ranks_rows():
    """Each rank has recorded some of the rows; a row without a label counts nowhere."""
    rng, rows = np.random.default_rng(3), Rows()
    labels = [-1 if i == 4 else int(rng.integers(3)) for i in range(11)]
    for i, label in enumerate(labels):
        rows.add([1, 2, 3], [False] * 3, f"a:{i}", label=label)
    examples, chances = rows.freeze(), torch.tensor(rng.dirichlet(np.ones(3), 11))
    recorders = [Recorder(Classes(3)), Recorder(Classes(3))]
    for i in range(11):
        recorders[i % 2].kept[i] = {"probabilities": chances[i]}
    first = Rank()
    outcomes(recorders[0], examples, first)
    confidence, right = outcomes(recorders[1], examples, Rank(first.mine))
    kept = [i for i in range(11) if i != 4]
    assert confidence == pytest.approx([max(chances[i].tolist()) for i in kept], abs=0)
    assert right.tolist() == [int(chances[i].argmax()) == labels[i] for i in kept]


def test_the_threshold_comes_from_validation_alone():
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    right = np.array([True, True, False, False])
    found = settle({"validation": (confidence, right), "test": (confidence, ~right)}, 0.9)
    assert found["below"] == pytest.approx(0.75)
    assert found["splits"] == {
        "validation": {"coverage": 0.5, "answered_accuracy": 1.0},
        "test": {"coverage": 0.5, "answered_accuracy": 0.0},
    }
    assert "75" in told(found)
    assert "test: 50.0% answered, 0.0% of these right" in told(found)
    none = settle({"validation": (confidence, ~right), "test": (confidence, right)}, 0.9)
    assert (none["below"], none["splits"]) == (None, {})
    assert "no threshold makes 90.0% of the answers on validation right: the surest 100.0% of rows are, 50.0%" in told(
        none
    )
    unasked = settle({"test": (confidence, right)}, None)
    assert told(unasked) is None
    assert unasked["curves"]["test"][1] == (0.5, 1.0, 0.8)


def test_a_threshold_goes_with_its_steps_weights(tmp_path):
    path = tmp_path / "summary.json"
    assert threshold_of_run(tmp_path, 7) == (None, None)
    path.write_text(json.dumps({"tested_step": 7, "abstain": {"below": 0.25}}))
    assert threshold_of_run(tmp_path, 7) == (0.25, None)
    below, line = threshold_of_run(tmp_path, 9)
    assert below is None
    assert "step 7" in line
    assert "step 9" in line
    assert "evaluation.abstain_below" in line
    for spoilt in (None, 3, {}, {"below": None}, {"below": "x"}):
        path.write_text(json.dumps({"tested_step": 7, "abstain": spoilt}))
        assert threshold_of_run(tmp_path, 7) == (None, None)


CLASSIFY = ["model=tiny", "data.train=x.jsonl", "train.max_steps=1", "objective=classify"]


@pytest.mark.parametrize(
    ("given", "training", "words"),
    [
        (["evaluation.abstain=0.9"], True, "chosen on a validation split"),
        (
            ["evaluation.abstain=0.9", "data.validation_share=0.1", "evaluation.splits=[test]"],
            True,
            "name validation in",
        ),
        (["evaluation.abstain=1", "data.validation_share=0.1"], True, "above 0 and below 1"),
        (["evaluation.abstain=0", "data.validation_share=0.1"], True, "above 0 and below 1"),
        (["evaluation.abstain=0.9", "data.validation_share=0.1", "objective=sft"], True, "this is sft"),
        (["evaluation.abstain_below=0.5"], True, "evaluation.abstain=<accuracy>"),
        (["evaluation.abstain_below=1.5"], False, "a probability from 0"),
    ],
)
def test_refusals(given, training, words):
    with pytest.raises(ConfigFaults) as error:
        load_config([*CLASSIFY, *given], training=training)
    assert words in str(error.value)


def test_what_is_allowed():
    asked = load_config([*CLASSIFY, "evaluation.abstain=0.9", "data.validation_share=0.1"])
    assert asked.evaluation.abstain == 0.9
    assert load_config([*CLASSIFY, "evaluation.abstain_below=0"], training=False).evaluation.abstain_below == 0


@pytest.mark.parametrize("verb", [["evaluate"], ["generate", "--prompt", "x"]])
def test_a_model_that_is_read_takes_a_probability(verb, capfd):
    """A target would be ignored; that of a run's own configuration is no fault."""
    assert cli([*verb, "model.path=x", "objective=classify", "evaluation.abstain=0.99"]) == 2
    assert "evaluation.abstain_below=<probability>" in capfd.readouterr().err
