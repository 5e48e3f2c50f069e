"""Make any PyTorch model ternary: replace its nn.Linear layers by BitLinear."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from bitnet.errors import BitNetError
from bitnet.layers import BitLinear

M = TypeVar("M", bound=nn.Module)

# Common names of the layer that turns states into logits; tied heads are found by their weight.
HEADS = ("lm_head", "head", "output", "classifier", "score", "embed_out", "unembed")


def convert(model: M, linear: str = "ternary", exclude: str | Iterable[str] = HEADS) -> M:
    """Replace every nn.Linear in `model` by a BitLinear that shares its parameters, in place. Returns `model`.

    linear: "ternary" or "binary". exclude: patterns that match the last part of a layer's name, or its full name
    ("lm_head", "encoder.*"). Embeddings, layers that share the weight of an embedding, and subclasses of nn.Linear
    (other code often reads their weight without calling the layer) are left unchanged.
    Raises BitNetError if there is nothing to replace.
    """
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    replaced: dict[nn.Linear, BitLinear] = {}  # a layer that is used twice remains one layer
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear or not name or id(module.weight) in tied:
            continue
        parent, _, child = name.rpartition(".")
        if any(fnmatchcase(name, pattern) or fnmatchcase(child, pattern) for pattern in patterns):
            continue
        if module not in replaced:
            replaced[module] = _bit_linear(module, linear)
        setattr(model.get_submodule(parent), child, replaced[module])
    if not replaced:
        raise BitNetError(
            f"convert: got a {type(model).__name__} without an nn.Linear to replace, expected at least one inside it "
            f"that is not excluded ({', '.join(patterns) or 'nothing'})"
        )
    for module in model.modules():
        # In evaluation these two would read the float weights of their linears, without calling them.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def _bit_linear(old: nn.Linear, linear: str) -> BitLinear:
    new = BitLinear(old.in_features, old.out_features, old.bias is not None, device="meta", linear=linear)
    new.weight, new.bias = old.weight, old.bias
    return new.train(old.training)
