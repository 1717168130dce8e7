"""What a method's keys cannot be is refused by value, rule and remedy; keys that came later do not end older runs."""

from __future__ import annotations

import pytest
from tritune.trainer.config.compose import load_config
from tritune.trainer.config.identity import identity_in, identity_of
from tritune.trainer.errors import ConfigFaults

LORA = ["model=tiny", "data.train=rows.jsonl", "train.max_steps=1", "method=lora"]

REFUSED = [
    ("method.lora_plus_ratio=0", "method.lora_plus_ratio=0.0: the rate of B is so many times that of A", "Use 1"),
    ("method.lora_plus_ratio=-2", "method.lora_plus_ratio=-2.0: the rate of B", "Use 1"),
    ("method.lora_plus_ratio=nan", "method.lora_plus_ratio=nan: the rate of B", "Use 1"),
    ("method.alpha=inf", "method.alpha=inf: the update is scaled by alpha", "Use a positive value"),
    ("method.rank_pattern={q_proj: 0}", "method.rank_pattern={'q_proj': 0}: a rank must be at least 1", "Common values"),
    ("method.rank_pattern={q_proj: half}", "method.rank_pattern={q_proj: half}: Value 'half'", "It expects dict[str, int]"),
    ("method.alpha_pattern={q_proj: -1}", "method.alpha_pattern={'q_proj': -1.0}: an alpha must be positive", "Use e.g."),
    ("method.rank_pattern={*q_proj: 2}", "*q_proj is no regular expression", "Write e.g. q_proj"),
    ("method.targets=['re:.*(q']", "re:.*(q is no regular expression", r"Write e.g. re:.*\.layers\.[01]\..*"),
    ("method.exclude=['re:[']", "re:[ is no regular expression", r"Write e.g. re:.*\.layers\.[01]\..*"),
    ("model.storage=int2", "Invalid value 'int2'", "expected one of [plain, nf4]"),
    ("method.dora=perhaps", "method.dora=perhaps: Value 'perhaps'", "It expects bool"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "said", "remedy"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(override, said, remedy):
    with pytest.raises(ConfigFaults) as raised:
        load_config([*LORA, override])
    (fault,) = raised.value.faults
    assert said in fault
    assert remedy in fault


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=full"], "method=full trains them. Use one of the methods adapter, lora"),
        (
            ["method=full", "method.freeze=[embed_tokens]"],
            "method=full trains them. Use one of the methods adapter, lora",
        ),
        (["train.compile=true"], "torch.compile does not see into NF4. Use train.compile=false"),
    ],
)
def test_four_bits_hold_a_frozen_base_alone(overrides, said):
    with pytest.raises(ConfigFaults) as raised:
        load_config([*LORA, "model.storage=nf4", *overrides])
    (fault,) = raised.value.faults
    assert fault.startswith("model.storage=nf4: ")
    assert said in fault
    assert load_config([*LORA, "model.storage=nf4"]).model.storage == "nf4"


def test_the_remedies_are_taken():
    words = [r"method.targets=['re:.*\.layers\.[01]\..*']", r"method.rank_pattern={layers\.1\..*: 4}",
             "method.lora_plus_ratio=16", "method.alpha_pattern.q_proj=32"]  # fmt: skip
    method = load_config([*LORA, *words]).method
    assert (method.rank_of("model.layers.1.mlp.up_proj"), method.rank_of("model.layers.11.mlp.up_proj")) == (4, 16)
    assert (method.scaling_of("a.q_proj"), method.scaling_of("a.vq_proj")) == (2.0, 2.0)


def test_a_run_of_before_there_were_the_keys_goes_on():
    config = load_config(LORA)
    found = identity_of(config)
    assert found["method.rank"] == 16
    before = {"method": {"name": "lora", "rank": 16, "alpha": 32.0}}
    later = {"method": {**before["method"], "dora": False, "rslora": False, "lora_plus_ratio": 1.0, "rank_pattern": {}}}
    assert identity_in(before) == identity_in(later)
    for key, value in (("dora", True), ("rslora", True), ("lora_plus_ratio", 2.0), ("rank_pattern", {"q_proj": 2})):
        assert identity_in({"method": {**later["method"], key: value}}) != identity_in(before), key
