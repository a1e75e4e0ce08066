"""Shared by the tests of genfast.nn.MultiheadAttention: both modules, their inputs and masks, and how they compare."""

import warnings

import torch
from torch import nn

from genfast.nn import MultiheadAttention

N, L, S, E, H = 2, 5, 5, 8, 4

CONSTRUCTORS = {
    "plain": {},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "bias-kv-zero": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 6, "vdim": 10},
    "widths-no-bias": {"kdim": 6, "bias": False},
    "widths-bias-kv-zero": {"vdim": 3, "add_bias_kv": True, "add_zero_attn": True},
}
MASKS = {
    "none": (None, None),
    "padding": ("bool", None),
    "padding-float": ("float", None),
    "rows": (None, "bool"),
    "rows-float": (None, "float"),
    "heads": (None, "bool-3d"),
    "heads-float": (None, "float-3d"),
    "both": ("bool", "bool"),
    "both-float": ("float", "float"),
    "both-heads": ("bool", "bool-3d"),
    "both-heads-float": ("float", "float-3d"),
    "mixed": ("bool", "float"),
    "mixed-heads": ("float", "bool-3d"),
}
LAYOUTS = ("sequence-first", "batch-first", "unbatched")


def pair(dropout=0.0, dtype=torch.float64, **options):
    """Both modules with the same parameters, none of them 0; theirs in float64."""
    reference = nn.MultiheadAttention(E, H, dropout, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    ours = MultiheadAttention(E, H, dropout, dtype=dtype, **options)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def inputs(layout="batch-first", kdim=E, vdim=E, queries=L, keys=S):
    def one(length, width):
        shape = {"batch-first": (N, length), "sequence-first": (length, N), "unbatched": (length,)}[layout]
        return torch.randn(*shape, width, dtype=torch.float64)

    return one(queries, E), one(keys, kdim), one(keys, vdim)


def mask(kind, layout, padding, queries=L, keys=S):
    """A mask under which every query sees the first key."""
    if kind is None:
        return None
    if padding:
        shape = (keys,) if layout == "unbatched" else (N, keys)
    else:
        heads = (H if layout == "unbatched" else N * H,) if kind.endswith("3d") else ()
        shape = (*heads, queries, keys)
    if kind.startswith("float"):
        return torch.randn(shape, dtype=torch.float64)
    hidden = torch.rand(shape) > 0.5
    hidden[..., 0] = False
    return hidden


def results(attention, tensors, masks, **options):
    """out, weights and the gradients of the inputs, of the parameters and of float masks."""
    dtype = attention.out_proj.weight.dtype
    leaves = {}
    for x in tensors:  # a tensor given twice is one leaf
        leaves.setdefault(id(x), x.detach().to(dtype).requires_grad_())
    masks = [m if m is None or not m.is_floating_point() else m.to(dtype).requires_grad_() for m in masks]
    out, weights = attention(
        *(leaves[id(x)] for x in tensors), key_padding_mask=masks[0], attn_mask=masks[1], **options
    )
    total = (out * torch.linspace(-2, 1, out.numel(), dtype=dtype).view(out.shape).cos()).sum()
    if weights is not None:
        total = total + (weights * torch.linspace(-1, 3, weights.numel(), dtype=dtype).view(weights.shape).cos()).sum()
    wanted = [*leaves.values(), *attention.parameters(), *(m for m in masks if m is not None and m.requires_grad)]
    return out, weights, *torch.autograd.grad(total, wanted)


def assert_same(ours, reference, tensors, masks=(None, None), tolerance=1e-11, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs: masks of two dtypes are deprecated
        expected = results(reference, tensors, masks, **options)
    got = results(ours, tensors, masks, **options)
    for x, y in zip(got, expected, strict=True):
        if y is None:
            assert x is None
            continue
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def causal(queries=L, keys=S):
    return torch.ones(queries, keys, dtype=torch.bool).triu(1)
