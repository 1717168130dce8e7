"""Kernels in whole models: each family beside its own code, adapters, packed rows; taken out again; nothing else touched."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import types

import pytest
import torch
from judge import DEVICE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from tritune.kernels.dispatch import KERNELS, Choice, announce, choose
from tritune.kernels.dropout import token_keys
from tritune.kernels.families import FAMILIES
from tritune.kernels.install import install, uninstall
from tritune.kernels.selfcheck import self_check, sizes_of
from tritune.trainer.methods.lora import LoraConfig
from tritune.trainer.methods.lora_layers import add_lora
from tritune.trainer.model.scorer import TESTED_FAMILIES

ALL = {kernel: Choice("triton", "asked for") for kernel in KERNELS}
SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "tie_word_embeddings": False}  # fmt: skip
OWN = {
    "mistral": {"sliding_window": 4}, "phi3": {"sliding_window": 4}, "qwen2": {"use_sliding_window": True, "sliding_window": 4},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def build(family, attention="eager", **settings):
    config = AutoConfig.for_model(family, **{**SMALL, **OWN.get(family, {}), **settings})
    config.use_cache = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(DEVICE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def adapt(model, **settings):
    """Adapters as training adds them, before the model comes to its device, and the model there."""
    add_lora(LoraConfig(rank=4, **settings), model, [], 0)
    return model.to(DEVICE)


def forward_and_gradients(model, double=False):
    """Logits of two rows, each two packed documents, and every gradient, for one upstream gradient."""
    if double:
        model = model.double()
    ids = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6]]).to(DEVICE)
    starts = (positions == 0).cumsum(-1)
    document = (starts[:, None, :, None] == starts[:, None, None, :]).tril()
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(document.shape, dtype=dtype, device=DEVICE).masked_fill(~document, torch.finfo(dtype).min)
    masks = {"full_attention": mask, "sliding_attention": mask} if hasattr(model.config, "layer_types") else mask
    for layer in model.modules():
        if hasattr(layer, "keys"):
            layer.keys.set(token_keys(1, 2, torch.arange(2), 9).to(DEVICE))
    model.zero_grad()
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=masks).last_hidden_state
    logits = model.lm_head(hidden)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6)).to(DEVICE, dtype)
    (logits * upstream).sum().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def require_as_exact(kernels, plain, exact):
    """The 2 x rule over a whole model, tensor by tensor, in root mean squares."""
    assert kernels.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        error, theirs = (float((x[name].double() - truth).square().mean().sqrt()) for x in (kernels, plain))
        assert error <= 2.0 * max(theirs, 2.0**-23 * float(truth.abs().max())), (
            f"{name}: {error:.1e} beside {theirs:.1e}"
        )


def exact_of(model):
    """The same model in float64, its code's casts to float32 ignored."""
    from tritune.trainer.model.scorer import KeepFloat64

    with KeepFloat64():
        return forward_and_gradients(copy.deepcopy(model), double=True)


CASES = [(f, {}) for f in FAMILIES] + [("phi3", {"rope_parameters": PARTIAL}), ("qwen2", {"tie_word_embeddings": True})]


@pytest.mark.parametrize(("family", "settings"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_a_family_computes_the_same_with_kernels_and_again_without(family, settings):
    model = build(family, **settings)
    plain, exact = forward_and_gradients(model), exact_of(model)
    done = install(model, ALL)
    assert done.counts["rope"] == done.counts["glu"] == 2
    assert done.counts["rms_norm"] >= 5
    assert done.head
    assert not done.left
    require_as_exact(forward_and_gradients(model), plain, exact)
    uninstall(done)
    again = forward_and_gradients(model)
    assert all(torch.equal(again[n], plain[n]) for n in plain)
    assert not [m for m in model.modules() if "forward" in vars(m) or "computes" in vars(m)]


@pytest.mark.parametrize(
    "targets", [["all-linear"], ["q_proj", "v_proj"], ["o_proj", "up_proj"], ["down_proj"]], ids="-".join
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapters_on_any_subset_of_layers(targets, dropout):
    model = build("qwen2", "sdpa")  # biases on queries, keys and values
    adapt(model, alpha=6.0, dropout=dropout, targets=targets)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    plain, exact = forward_and_gradients(model), exact_of(model)
    done = install(model, ALL)
    # o_proj alone in attention, and down_proj: of an MLP with any adapted layer the whole is one node
    groups = {"all-linear": (2, 2, 2), "q_proj": (2, 0, 0), "o_proj": (0, 2, 2), "down_proj": (0, 2, 0)}[targets[0]]
    assert tuple(done.counts[c] for c in ("lora group", "lora mlp", "lora layer")) == groups
    require_as_exact(forward_and_gradients(model), plain, exact)
    model.eval()
    without = forward_and_gradients(model)
    assert dropout == 0.0 or not torch.equal(without["logits"], plain["logits"])
    uninstall(done)
    require_as_exact(without, forward_and_gradients(model), exact_of(model))


def test_adapters_on_fused_projections_of_phi3():
    model = build("phi3")
    adapt(model, dropout=0.1)
    plain, exact = forward_and_gradients(model), exact_of(model)
    assert install(model, ALL).counts["lora group"] == 2
    require_as_exact(forward_and_gradients(model), plain, exact)


def test_dora_keeps_its_own_code_and_the_rest_gets_kernels():
    """The kernels of LoRA know no lengths: a model that computes with them anyway would be another."""
    model = build("qwen2", "sdpa")
    adapt(model, dora=True, dropout=0.1, targets=["q_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            nn.init.normal_(parameter, std=0.3)
    plain, exact = forward_and_gradients(model), exact_of(model)
    assert sizes_of(model).lora == ()
    done = install(model, ALL)
    assert not [c for c in done.counts if c.startswith("lora")]
    assert done.counts["glu"] == 2
    assert done.left == ["4 x DoraLinear on Linear, which no kernel computes"]
    require_as_exact(forward_and_gradients(model), plain, exact)
    assert plain["model.layers.0.mlp.down_proj.magnitude_change"].any()


def test_an_unknown_family_gets_what_fits_and_is_told_so():
    model = build("granite", logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5)
    plain, exact = forward_and_gradients(model), exact_of(model)
    done = install(model, ALL)
    assert set(done.counts) == {"rms_norm", "linear_cross_entropy"}
    assert done.left[0].startswith("rotation and MLP of granite, a family not known here")
    require_as_exact(forward_and_gradients(model), plain, exact)


@pytest.mark.slow
@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_any_family_that_trains_can_be_asked_for_kernels(family):
    """Whatever its blocks are called: what does not fit is left alone, what is put in computes the same."""
    own = {"cohere": {"logit_scale": 0.5}, "phi3": {"rope_parameters": PARTIAL}}.get(family, {})
    model = build(family, **own).eval()  # GPT-2 has dropout of its own
    ids = torch.arange(3, 12, device=DEVICE)[None]
    expected = model(input_ids=ids).logits
    sizes = sizes_of(model)
    assert sizes.head == (101, 32)
    assert (sizes.mlp is None) == (sizes.rotation is None) == (family not in FAMILIES)
    assert family != "phi3" or sizes.rotation == (4, 2, 8, 4)
    install(model, ALL)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_norm_of_another_kind_and_an_odd_activation_are_left_alone():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x):
            return x * self.weight

    model = build("llama", hidden_act="relu")
    model.model.norm = OddRMSNorm().to(DEVICE)
    done = install(model, ALL)
    assert done.counts["rms_norm"] == 4
    assert done.counts["glu"] == 0
    assert done.left == [
        "OddRMSNorm, which computes something else",
        *["LlamaMLP: its activation is neither SiLU nor GELU by tanh"] * 2,
    ]


def test_a_head_that_is_wrapped_or_absent_is_left_to_chunks():
    model = build("llama")
    adapt(model, targets=["q_proj", "lm_head"])
    done = install(model, ALL)
    assert not done.head
    assert done.left == ["the output head (it is a LoRALinear): logits are made in chunks"]


def test_the_head_takes_targets_and_caps_as_its_family_does():
    model = build("gemma2")
    hidden, targets = torch.randn(7, 32, device=DEVICE), torch.arange(7, device=DEVICE)
    logits = torch.tanh(model.lm_head(hidden).double() / 5.0) * 5.0
    install(model, ALL)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(model.lm_head(hidden, targets).double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.lm_head(hidden, targets, "sum").double(), nll.sum(), rtol=1e-5, atol=1e-5)


def test_one_kernel_alone():
    model = build("llama")
    for kernel, count in [("rope", "rope"), ("glu", "glu"), ("rms_norm", "rms_norm"), ("linear_cross_entropy",) * 2]:
        done = install(model, {k: Choice("triton" if k == kernel else "reference", "") for k in KERNELS})
        assert set(done.counts) == {count}
        uninstall(done)
    assert install(model, {k: Choice("reference", "") for k in KERNELS}).modules == []


def test_a_deep_copy_computes_with_its_own_weights():
    model = build("llama")
    install(model, ALL)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ids = torch.arange(3, 9, device=DEVICE)[None]
    assert twin(input_ids=ids).logits.abs().max() > 0.1


def test_a_state_dict_and_generation_are_what_they_were():
    model = build("llama")
    keys = list(model.state_dict())
    ids = torch.arange(3, 9, device=DEVICE)[None]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    install(model, ALL)
    assert list(model.state_dict()) == keys
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True), expected)


def test_an_attention_that_takes_more_than_is_known_is_left_as_it_is(monkeypatch):
    """transformers renamed an argument once: ours took it among the rest, and generated without its cache."""
    model = build("llama")
    block = type(model.model.layers[0].self_attn)
    own = block.forward

    def forward(self, hidden_states, sinks=None, **kwargs):
        return own(self, hidden_states, **kwargs)

    monkeypatch.setattr(block, "forward", forward)
    done = install(model, ALL)
    assert done.left == ["LlamaAttention, whose forward takes sinks, unknown here"]
    assert done.counts["rope"] == 0
    assert done.counts["glu"] == 2


def attributes():
    """Every attribute of every torch and transformers module and of their classes, by identity."""
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "transformers") and isinstance(module, types.ModuleType):
            for key, value in list(vars(module).items()):
                seen[name, key] = id(value)
                if isinstance(value, type) and value.__module__.split(".")[0] in ("torch", "transformers"):
                    seen |= {(value.__module__, value.__qualname__, k): id(v) for k, v in list(vars(value).items())}
    return seen


def test_no_attribute_of_torch_or_transformers_is_changed():
    model = build("llama")
    adapt(model)
    install(model, {})
    forward_and_gradients(model)  # whatever the libraries set up lazily is there now
    gc.collect()
    before = attributes()
    done = install(model, ALL)
    forward_and_gradients(model)
    after = attributes()
    changed = {k for k in before if after.get(k) != before[k]}
    assert not {k for k in changed if k[-1] not in ("__abstractmethods__", "_abc_impl")}
    uninstall(done)
    fresh = build("llama")
    assert not [m for m in fresh.modules() if "forward" in vars(m)], "another model of the same class is untouched"


# -- dispatch and self-check ------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_what_is_chosen_and_why(monkeypatch):
    chosen = choose("auto", {}, CPU, torch.float32)
    assert {c.implementation for c in chosen.values()} == {"reference"}
    monkeypatch.setattr("tritune.kernels.dispatch.why_not", lambda device, dtype: None)
    gpu = choose("auto", {"rope": "reference"}, torch.device("cuda"), torch.bfloat16)
    assert {k for k, c in gpu.items() if c.implementation == "triton"} == set(KERNELS) - {"rope"}
    assert announce(gpu)[0].startswith("triton (on cuda): linear_cross_entropy, lora")
    assert announce(gpu)[1] == "reference (asked for): rope"
    compiled = choose("auto", {}, torch.device("cuda"), torch.bfloat16, compiled=True)
    assert {c.reason for c in compiled.values()} == {"torch.compile would stop at each of them"}


def test_asking_for_what_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr("tritune.kernels.language.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^kernels=triton: Triton does not run on cpu\. Use auto"):
        choose("triton", {}, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"^kernels\.lora=triton: Triton does not run on cpu"):
        choose("reference", {"lora": "triton"}, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"would be wrong in float64"):
        choose("triton", {}, torch.device("cuda"), torch.float64)


def test_the_self_check_passes_on_a_real_model_s_sizes_and_falls_back_with_a_reason(monkeypatch):
    model = build("gemma2")
    adapt(model, dropout=0.1)
    sizes = sizes_of(model)
    assert sizes.norms == ((32, False),)
    assert sizes.rotation == (4, 2, 8, 8)
    assert sizes.mlp == (48, "gelu_tanh")
    assert sizes.head == (101, 32)
    assert (48, 32, 4, 0.1) in sizes.lora
    assert self_check(ALL, sizes, DEVICE, torch.float32) == ALL
    from tritune.kernels import selfcheck

    wrong, broken = selfcheck.rms_norm_reference, selfcheck.rope_reference
    monkeypatch.setattr(selfcheck, "rms_norm", lambda x, w, eps: wrong(x, w, eps) * (1.0 + 1e-5))
    monkeypatch.setattr(selfcheck, "rope", lambda *a: broken(*a) + (1,) + 1)
    checked = self_check(ALL, sizes, DEVICE, torch.float32)
    assert checked["rms_norm"].implementation == checked["rope"].implementation == "reference"
    assert "times the reference's error, and 2 are allowed" in checked["rms_norm"].reason
    assert "its self-check raised TypeError" in checked["rope"].reason
    assert {k for k, c in checked.items() if c.implementation == "triton"} == {"linear_cross_entropy", "lora", "glu"}


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # whoever imports it, or asks whether it could, is told no
import torch
def refuse(*a, **k): raise RuntimeError("a device was touched")
torch._C._cuda_init = refuse
torch.cuda._lazy_init = refuse
import tritune.kernels.install, tritune.kernels.selfcheck, tritune.kernels.linear_kl, tritune.kernels.nf4
from tritune.kernels.dispatch import choose
chosen = choose("auto", {}, torch.device("cpu"), torch.float32)
assert {c.reason for c in chosen.values()} == {"Triton is not installed"}, chosen
from tritune.kernels.rms_norm import rms_norm, rms_norm_reference
x = torch.ones(2, 4)
rms_norm_reference(x, x[0], 1e-6)
try:
    rms_norm(x, x[0], 1e-6)
except ValueError as error:
    assert "Triton is not installed" in str(error)
assert sys.modules["triton"] is None and not torch.cuda.is_initialized()
print("imported")
"""


def test_importing_needs_no_triton_and_touches_no_device():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr


def test_what_never_runs_stays_as_it_is():
    """Pixtral's tower has the names and the norms of a Mistral decoder, and other sizes."""
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip
    text = {**SMALL, **OWN["mistral"], "model_type": "mistral"}
    config = AutoConfig.for_model("mistral3", vision_config=vision, text_config=text, image_token_index=3)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").to(DEVICE)
    tower = model.model.vision_tower
    norms = {width for width, _ in sizes_of(model).norms}
    assert norms == {16, 32}, "else there is nothing to tell apart"
    idle = [tower, model.model.multi_modal_projector]
    sizes = sizes_of(model, idle)
    assert {width for width, _ in sizes.norms} == {32}
    assert sizes.rotation == (4, 2, 8, 8)
    assert sizes.mlp == (48, "silu")
    ids = torch.randint(4, 101, (2, 9), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        done = install(model, ALL, idle)
        after = model(input_ids=ids, use_cache=False).logits
    decoder = set(model.model.language_model.modules()) | {model.lm_head}
    assert done.modules
    assert set(done.modules) <= decoder
    assert done.counts["rms_norm"] == 5
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
