"""Bad input of attention is refused before a kernel runs, and messages say what was given and what is supported."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import RAW

import genfast
from genfast import ops
from genfast.ops._attention_arguments import arguments

Q = torch.zeros(2, 4, 3, 8)
K = torch.zeros(2, 2, 5, 8)
BAD = {
    "list": (lambda: ops.attention([1.0], K, K), TypeError, "q must be a torch.Tensor, got list"),
    "none": (lambda: ops.attention(Q, None, K), TypeError, "k must be a torch.Tensor, got NoneType"),
    "integers": (lambda: ops.attention(Q, K, K.int()), TypeError, "v must be float32.*int32"),
    "complex": (lambda: ops.attention(Q.to(torch.complex64), K, K), TypeError, "q must be float32.*complex64"),
    "sparse": (lambda: ops.attention(Q.to_sparse(), K, K), TypeError, "layout torch.sparse_coo"),
    "dtypes": (lambda: ops.attention(Q, K.double(), K), TypeError, "q is torch.float32, k torch.float64"),
    "devices": (lambda: ops.attention(Q, K, K.to("meta")), ValueError, "q is on cpu, k on cpu, v on meta"),
    "dims": (lambda: ops.attention(Q[0], K[0], K[0]), ValueError, r"got shapes \(4, 3, 8\)"),
    "batch": (lambda: ops.attention(Q[:1], K, K), ValueError, "batch sizes.*got 1, 2 and 2"),
    "keys": (lambda: ops.attention(Q, K, K[:, :, :4]), ValueError, "k and v must have the same heads and positions"),
    "width": (lambda: ops.attention(Q, K[..., :7], K), ValueError, "same head dim, got 8 and 7"),
    "d=0": (lambda: ops.attention(Q[..., :0], K[..., :0], K), ValueError, "head dims must be at least 1, got 0"),
    "dv=0": (lambda: ops.attention(Q, K, K[..., :0]), ValueError, "and 0 of v"),
    "gqa": (lambda: ops.attention(Q[:, :3], K, K), ValueError, "must be a multiple of k's and v's, got 3 and 2"),
    "no kv": (lambda: ops.attention(Q, K[:, :0], K[:, :0]), ValueError, "multiple of k's and v's, got 4 and 0"),
    "bias": (lambda: ops.attention(Q, K, K, bias=torch.zeros(3, 4)), ValueError, r"bias of shape \(3, 4\) does not"),
    "bias dims": (lambda: ops.attention(Q, K, K, bias=torch.zeros(1, 1, 1, 3, 5)), ValueError, "does not broadcast"),
    "bias dtype": (lambda: ops.attention(Q, K, K, bias=torch.zeros(5).double()), TypeError, "bias is torch.float64"),
    "bias device": (lambda: ops.attention(Q, K, K, bias=torch.zeros(5, device="meta")), ValueError, "bias is on meta"),
    "float mask": (lambda: ops.attention(Q, K, K, mask=torch.zeros(5)), TypeError, "mask must be bool.*as bias"),
    "int mask": (lambda: ops.attention(Q, K, K, mask=torch.zeros(5).int()), TypeError, r"\.bool\(\)"),
    "mask": (lambda: ops.attention(Q, K, K, mask=torch.ones(2, 5).bool()), ValueError, r"mask of shape \(2, 5\)"),
    "mask list": (lambda: ops.attention(Q, K, K, mask=[True]), TypeError, "mask must be a torch.Tensor, got list"),
    "causal": (lambda: ops.attention(Q, K, K, causal="left"), ValueError, "causal must be.*got 'left'"),
    "causal 1": (lambda: ops.attention(Q, K, K, causal=1), TypeError, "causal must be.*got int"),
    "window": (lambda: ops.attention(Q, K, K, window=(2, -2)), ValueError, "right side must be at least.*got -2"),
    "window float": (lambda: ops.attention(Q, K, K, window=(2.0, 1)), TypeError, "left side must be an int, got float"),
    "window int": (lambda: ops.attention(Q, K, K, window=3), TypeError, r"a pair \(left, right\), got 3"),
    "softcap": (lambda: ops.attention(Q, K, K, softcap=0.0), ValueError, "softcap must be positive.*got 0.0"),
    "softcap text": (lambda: ops.attention(Q, K, K, softcap="1"), TypeError, "softcap must be a number, got str"),
    "scale": (lambda: ops.attention(Q, K, K, scale=math.inf), ValueError, "scale must be finite, got inf"),
    "scale tensor": (lambda: ops.attention(Q, K, K, scale=torch.ones(())), TypeError, "scale must be a number"),
    "sinks": (lambda: ops.attention(Q, K, K, sinks=torch.zeros(2)), ValueError, r"sinks must have shape \(4,\)"),
    "sinks dtype": (lambda: ops.attention(Q, K, K, sinks=torch.zeros(4).double()), TypeError, "sinks must be"),
    "slopes": (lambda: ops.attention(Q, K, K, alibi_slopes=torch.zeros(1, 4)), ValueError, r"\(4,\) or \(2, 4\)"),
    "dropout 1": (lambda: ops.attention(Q, K, K, dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1"),
    "dropout -": (lambda: ops.attention(Q, K, K, dropout_p=-0.1), ValueError, r"in \[0, 1\), got -0.1"),
    "dropout nan": (lambda: ops.attention(Q, K, K, dropout_p=math.nan), ValueError, r"in \[0, 1\), got nan"),
    "dropout bool": (lambda: ops.attention(Q, K, K, dropout_p=True), TypeError, "dropout_p must be a number, got bool"),
    "seed": (lambda: ops.attention(Q, K, K, dropout_p=0.1, seed=1.5), TypeError, "seed must be an int"),
    "unused seed": (lambda: ops.attention(Q, K, K, seed="7"), TypeError, "seed must be an int"),
    "relative": (lambda: ops.attention(Q, K, K, relative_bias=Q), TypeError, "a T5Bias or a WindowBias2d, got Tensor"),
    "dq": (lambda: ops.attention_jvp(Q, K, K, K, K, K), ValueError, r"dq has shape \(2, 2, 5, 8\), q"),
    "dk": (lambda: ops.attention_jvp(Q, K, K, Q, K.double(), K), TypeError, "dk is torch.float64, k torch.float32"),
    "dv": (lambda: ops.attention_jvp(Q, K, K, Q, K, 1.0), TypeError, "dv must be a torch.Tensor, got float"),
    "dbias": (lambda: ops.attention_jvp(Q, K, K, Q, K, K, dbias=K), ValueError, "dbias needs bias, which is None"),
    "dsinks": (
        lambda: ops.attention_jvp(Q, K, K, Q, K, K, sinks=torch.zeros(4), dsinks=torch.zeros(2)),
        ValueError,
        r"dsinks must have shape \(4,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, monkeypatch):
    call, expected, message = BAD[name]

    def never(*args):
        raise AssertionError("a kernel ran")

    for op in RAW.values():
        for backend in op.backends:
            monkeypatch.setitem(op.backends, backend, genfast._dispatch.Backend(never))
    with pytest.raises(expected, match=message):
        call()


RAW_NAMES = (
    "q", "k", "v", "bias", "table", "sinks", "mask", "q_index", "k_index", "q_starts", "k_starts", "seed", "scale",
    "softcap", "dropout_p", "left", "right", "shift", "bottom_right", "batch_offset",
)  # fmt: skip


def raw_with(**changes):
    values = dict(zip(RAW_NAMES, arguments("attention", Q, K, K, *(None,) * 2, False, *(None,) * 5, 0.0, None, None)))  # noqa: B905
    return tuple((values | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": K.double()}, "k must be torch.float32"),
        ({"sinks": torch.zeros(4).double()}, "sinks must be torch.float32"),
        ({"bias": torch.zeros(1, 1, 1, 4)}, "bias of shape"),
        ({"mask": torch.zeros(1, 1, 1, 5)}, "mask must be torch.bool"),
        ({"table": torch.zeros(1, 4, 6)}, "table must be torch.float32 of shape"),
        ({"table": torch.zeros(1, 4, 6), "q_index": torch.zeros(3).int()}, "go together"),
        (
            {"table": torch.zeros(1, 4, 6), "q_index": torch.arange(3).int() + 9, "k_index": torch.zeros(5).int()},
            r"in \[0, 6\), got 9 to 11",
        ),
        ({"dropout_p": 0.5}, "dropout needs a seed"),
        ({"dropout_p": 1.5, "seed": torch.tensor(1)}, "dropout_p 1.5"),
        ({"softcap": -1.0}, "softcap -1.0"),
        ({"left": -2}, "at least -1"),
    ],
)
def test_direct_calls_of_the_raw_op_are_checked(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.genfast.attention(*raw_with(**changes))
    out, lse = torch.ops.genfast.attention(*raw_with())
    good = (out, lse, *raw_with()[:6], out, lse, *raw_with()[6:], False, False)
    with pytest.raises(ValueError, match="dout must be"):
        torch.ops.genfast.attention_backward(out[..., :4], *good[1:])
    with pytest.raises(ValueError, match="lse must be"):
        torch.ops.genfast.attention_backward(*good[:9], lse.double(), *good[10:])
