"""The decoder's blocks, which are sharded, compiled and checkpointed one by one; and the modules that never run."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_MARK = "takes_no_part"


def set_apart(model: nn.Module, unused: Collection[str]) -> None:
    """Mark the modules, the outermost of each kind, of which no parameter takes part: text training never calls them.

    Args:
        unused: names of parameters, shared ones under all their names (`reached.find_unused`).
    """
    if not unused:
        return
    for module in outermost(model, unused):
        setattr(module, _MARK, True)


def outermost(module: nn.Module, names: Collection[str], prefix: str = "") -> list[nn.Module]:
    """The modules, none within another, all of whose parameters are among `names`; each name begins with `prefix`."""
    held, wanted = [prefix + n for n, _ in module.named_parameters(remove_duplicate=False)], frozenset(names)
    if held and all(n in wanted for n in held):
        return [module]
    return [m for n, child in module.named_children() for m in outermost(child, wanted, f"{prefix}{n}.")]


def idle_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `set_apart` marked."""
    return [m for m in model.modules() if getattr(m, _MARK, False)]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the decoder: the longest list of modules of one class among what runs."""
    idle = set(idle_modules(model))  # a vision tower may be the deeper one, and lists of the decoder hold layers for it
    running = [m for _, m in model.named_modules(memo=set(idle))]
    lists = [[x for x in m if x not in idle] for m in running if isinstance(m, nn.ModuleList)]
    return max((x for x in lists if len({type(m) for m in x}) == 1), key=len, default=[])


def compile_layers(model: nn.Module) -> None:
    """`torch.compile` each decoder layer: one graph serves all, and what shards a layer stays outside of it.

    Sizes are symbols from the first graph on. The layer's own numbers (its scale, its epsilon) are no symbols: as such they cost
    a graph on the CPU beside the one on the GPU, and half of the time. An H200 took 126 s with them for two layers of 128
    features, of which sympy took most.
    """
    from torch._dynamo import config  # it costs a second that only those pay who compile

    config.specialize_float = True
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)  # micro-batches have as many lengths as their rows
