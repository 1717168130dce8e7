"""Where virtual tokens go among real ones, and what they begin as."""

from __future__ import annotations

from functools import partial

import harness
import pytest
import torch
from tritune.trainer.config import ModelConfig
from tritune.trainer.config.compose import load_config
from tritune.trainer.errors import ConfigFaults, InputError
from tritune.trainer.methods.prompt import Init, PromptConfig
from tritune.trainer.methods.prompt_layers import lay_out, virtual_tokens
from tritune.trainer.model.load import load_architecture, load_model
from tritune.trainer.model.meta import load_meta_model
from tritune.trainer.model.tokenizer import byte_tokenizer
from tritune.trainer.model.weights import embeddings_of


def test_the_layout_of_packs():
    """Two documents in a row, one with padding behind that counts as another, and one behind padding on the left."""
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 1], [1, 1, 0, 1, 2]])
    begins = positions == 0
    layout = lay_out(begins, positions, 2)
    assert layout.sources.tolist() == [
        [0, 1, 2, 3, 0, 1, 4, 5, 6], [0, 1, 7, 8, 9, 0, 1, 10, 11], [12, 13, 0, 1, 14, 15, 16, 0, 0]
    ]  # fmt: skip
    assert layout.positions.tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2, 3], [3, 3, 0, 1, 2, 3, 4, 0, 1]
    ]  # fmt: skip
    assert layout.real.tolist() == [[2, 3, 6, 7, 8], [11, 12, 13, 16, 17], [18, 19, 22, 23, 24]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return harness.save_small_llama(tmp_path_factory.mktemp("model"), 160)


def begun(base, meta: bool, seed=3, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The virtual tokens as they begin, and the model's embeddings."""
    tokenizer, config = byte_tokenizer(), ModelConfig(path=str(base))
    args = (config, load_architecture(config, len(tokenizer)), tokenizer, None, 7, torch.float32)
    whole = load_model(*args)
    model, weights = load_meta_model(*args) if meta else (whole, None)
    method = PromptConfig(num_virtual_tokens=6, **settings)
    method.attach(model, [], seed, ())
    method.begin(model, tokenizer, seed, partial(embeddings_of, model, weights))
    return virtual_tokens(model).weight.detach(), whole.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("meta", [False, True])
def test_they_begin_as_words_that_the_model_knows(base, meta):
    ids = byte_tokenizer()("Sort.")["input_ids"]
    tokens, table = begun(base, meta, init=Init.text, init_text="Sort.")
    assert tokens.equal(table[(ids * 6)[:6]])
    tokens, table = begun(base, meta)
    found = [int((table - token).abs().sum(1).argmin()) for token in tokens]
    assert tokens.equal(table[found])
    assert len(set(found)) > 3
    assert not begun(base, meta, seed=4)[0].equal(tokens)
    assert begun(base, meta)[0].equal(tokens)
    tokens, _ = begun(base, meta, init=Init.random)
    assert float(tokens.std()) == pytest.approx(1, abs=0.2)


def test_a_text_is_given_where_one_is_asked_for(base):
    for words in (["method.init=text"], ["method.init_text=Sort"], ["method.init=text", "method.init_text=''"]):
        with pytest.raises(ConfigFaults) as raised:
            load_config(["model=tiny", "method=prompt", "export.enabled=false", *words], training=False)
        (fault,) = raised.value.faults
        assert fault.startswith("method.init_text=")
        assert "Give both or neither" in fault
    method = PromptConfig(init=Init.text, init_text="x")
    model = type("Model", (), {})
    with pytest.raises(InputError, match="the tokenizer makes no token of it"):
        method.begin(model, lambda text: {"input_ids": []}, 0, lambda ids: ids)
