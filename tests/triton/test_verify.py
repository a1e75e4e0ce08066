"""The checks that run on GPUs, over the Triton kernels in the interpreter (test_rbm.py has those of the chains)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import triton

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from genfast.verify import Context, checks_of, run_check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
STEMS = (
    "reparameterize", "log_likelihood", "log_ratio", "iwae_bound", "vector_quantize", "bernoulli_sample",
    "rbm_free_energy", "rotary", "attention_forward", "attention_backward", "attention_tangent", "attention_second",
    "bias_act", "diff_augment", "filtered_lrelu", "gan_loss", "upfirdn2d", "spectral_normalize", "minibatch_stddev",
    "adain",
)  # fmt: skip
CHECKS = {f"{op}-{check.name}": check for op in STEMS for check in checks_of(f"triton/{op}") if not check.gpu_only}


def test_every_kernel_has_checks():
    assert {name.partition("-")[0] for name in CHECKS} == set(STEMS)


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_pass_their_checks(name):
    record = run_check(CHECKS[name], Context("triton", "cpu", "tiny", seed=3))
    assert record.cases > 0
