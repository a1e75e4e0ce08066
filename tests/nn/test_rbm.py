"""genfast.nn.RBM against explicit formulas and exhaustive enumeration."""

import io
import itertools
import math

import pytest
import torch
from scipy import stats

import genfast
from genfast.nn import RBM


def make(visible, hidden, scale=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rbm = RBM(visible, hidden, dtype=dtype)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return rbm


def binary(rows, units, seed=1, dtype=torch.float64):
    return torch.bernoulli(torch.full((rows, units), 0.5), generator=torch.Generator().manual_seed(seed)).to(dtype)


def all_states(units, dtype=torch.float64):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=dtype)


def joint_energy(rbm, v, h):
    """-v'b - h'c - v'Wh for every pair of rows: [rows of v, rows of h]."""
    return -(v @ rbm.b).unsqueeze(1) - (h @ rbm.c).unsqueeze(0) - v @ rbm.W @ h.T


def test_free_energy_is_the_sum_over_hidden_states():
    rbm, v = make(4, 3), all_states(4)
    exact = -torch.logsumexp(-joint_energy(rbm, v, all_states(3)), 1)
    torch.testing.assert_close(rbm.free_energy(v), exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(make(4, 3, dtype=torch.float32).free_energy(v).double(), exact, rtol=2e-6, atol=2e-6)
    assert torch.autograd.gradcheck(rbm.free_energy, (torch.rand(2, 4, dtype=torch.float64, requires_grad=True),))


def test_free_energy_never_overflows():
    rbm = make(4, 3, scale=1e4, dtype=torch.float32)
    v = all_states(4, torch.float32)
    exact = -torch.logsumexp(-joint_energy(rbm.double(), v.double(), all_states(3)), 1)
    energy = rbm.float().free_energy(v)
    torch.testing.assert_close(energy.double(), exact, rtol=1e-5, atol=1e-2)
    energy.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in rbm.parameters())


def test_conditionals():
    rbm, v, h = make(4, 3), all_states(4), all_states(3)
    weights = torch.softmax(-joint_energy(rbm, v, h), 1)
    torch.testing.assert_close(rbm.hidden_prob(v), weights @ h)
    weights = torch.softmax(-joint_energy(rbm, v, h), 0)
    torch.testing.assert_close(rbm.visible_prob(h), weights.T @ v)


def test_samples_are_uniforms_below_the_probability():
    rbm, v, h = make(9, 7), binary(50, 9), binary(50, 7)
    seed = torch.tensor(11)
    draws = genfast.random.rbm_uniform(50, 7, seed, row_offset=3, step=4)
    assert torch.equal(rbm.sample_hidden(v, seed=11, step=4, row_offset=3), (draws < rbm.hidden_prob(v)).double())
    draws = genfast.random.rbm_uniform(50, 9, seed, step=1)
    sample = rbm.sample_visible(h, seed=11)
    assert torch.equal(sample, (draws < rbm.visible_prob(h)).double())
    assert not sample.requires_grad


def explicit_pseudo_likelihood(rbm, v):
    """sum_i log p(v_i | others), each conditional normalized over the two values of v_i."""
    total = torch.zeros(len(v), dtype=v.dtype)
    for unit in range(v.shape[1]):
        flipped = v.clone()
        flipped[:, unit] = 1 - flipped[:, unit]
        total += -rbm.free_energy(v) - torch.logaddexp(-rbm.free_energy(v), -rbm.free_energy(flipped))
    return total.mean()


@pytest.mark.parametrize("chunk", [1, 20, 2**22])
def test_pseudo_likelihood_is_exact(chunk, monkeypatch):
    monkeypatch.setattr(genfast.nn.rbm, "_CHUNK_ELEMENTS", chunk)
    rbm, v = make(7, 3), binary(5, 7)
    torch.testing.assert_close(rbm.pseudo_likelihood(v), explicit_pseudo_likelihood(rbm, v))
    (ours,) = torch.autograd.grad(rbm.pseudo_likelihood(v), rbm.W)
    (exact,) = torch.autograd.grad(explicit_pseudo_likelihood(rbm, v), rbm.W)
    torch.testing.assert_close(ours, exact)


def test_stochastic_pseudo_likelihood_is_unbiased():
    rbm, v = make(7, 3), binary(4, 7)
    with torch.no_grad():
        exact = rbm.pseudo_likelihood(v)
        draws = torch.stack([rbm.pseudo_likelihood(v, units=40, seed=seed) for seed in range(200)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - exact) < 4.5 * error  # false alarm once in 150,000 seeds
    assert torch.equal(rbm.pseudo_likelihood(v, units=3, seed=5), rbm.pseudo_likelihood(v, units=3, seed=5))


def explicit_gradient(rbm, v0, vk):
    """Of mean F(v0) - mean F(vk): the CD statistics with the sign of a loss."""
    h0, hk = rbm.hidden_prob(v0), rbm.hidden_prob(vk)
    return (
        vk.T @ hk / len(vk) - v0.T @ h0 / len(v0),
        vk.mean(0) - v0.mean(0),
        hk.mean(0) - h0.mean(0),
    )


@pytest.mark.parametrize("k", [1, 3])
def test_cd_gradient(k):
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    rbm.contrastive_divergence(v, k, seed=3).backward()
    exact = explicit_gradient(rbm, v, rbm.gibbs(v, k, seed=3))
    for parameter, gradient in zip((rbm.W, rbm.b, rbm.c), exact, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def test_cd_draws_new_noise_each_call_under_manual_seed():
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    torch.manual_seed(0)
    first, second = rbm.contrastive_divergence(v), rbm.contrastive_divergence(v)
    torch.manual_seed(0)
    assert torch.equal(rbm.contrastive_divergence(v), first)
    assert not torch.equal(first, second)


def test_pcd_gradient_and_chains():
    rbm, v, v2 = make(9, 5, 0.5), binary(16, 9), binary(12, 9, seed=2)
    rbm.contrastive_divergence(v, 2, persistent=True, seed=3)
    assert torch.equal(rbm.chains, rbm.gibbs(v, 2, seed=3))
    rbm.contrastive_divergence(v2, 1, persistent=True).backward()
    expected = rbm.gibbs(v, 3, seed=3)  # the chains go on under one seed with fresh half-steps
    assert torch.equal(rbm.chains, expected)
    assert rbm.chain_step == 6
    for parameter, gradient in zip((rbm.W, rbm.b, rbm.c), explicit_gradient(rbm, v2, expected), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="start_chains"):
        rbm.contrastive_divergence(v, persistent=True, seed=4)


def test_pcd_never_reuses_a_counter(monkeypatch):
    rbm, v = make(9, 5, 0.5, dtype=torch.float32), binary(8, 9, dtype=torch.float32)
    used = []
    sample = genfast.ops.bernoulli_sample

    def spy(*args, **options):
        used.append((int(options["seed"]), options["step"]))
        return sample(*args, **options)

    monkeypatch.setattr(genfast.ops, "bernoulli_sample", spy)
    rbm.start_chains(v, seed=5)
    rbm.chain_step = 2**32 - 6
    for _ in range(3):
        rbm.contrastive_divergence(v, k=2, persistent=True)
    assert len(used) == len(set(used)) == 12
    assert [seed for seed, _ in used] == [5] * 4 + [6] * 8


def test_pcd_resumes_bit_for_bit():
    data = binary(40, 9, dtype=torch.float32)

    def train(rbm, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            rbm.contrastive_divergence(data[step * 8 : step * 8 + 8], 2, persistent=True).backward()
            optimizer.step()

    def fresh():
        rbm = make(9, 5, 0.1, dtype=torch.float32)
        return rbm, torch.optim.SGD(rbm.parameters(), 0.1, momentum=0.9)

    rbm, optimizer = fresh()
    torch.manual_seed(0)
    train(rbm, optimizer, range(2))
    saved = io.BytesIO()
    torch.save({"rbm": rbm.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(rbm, optimizer, range(2, 5))
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    torch.manual_seed(99)
    resumed, optimizer = fresh()
    resumed.load_state_dict(state["rbm"])
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, range(2, 5))
    for name, value in rbm.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.chain_step == 20


def test_gibbs_in_parts_and_shards_is_gibbs_whole(monkeypatch):
    # float64, where a unit whose probability differs by rounding from its 24-bit uniform has odds of 1e-8
    rbm, v = make(33, 21, 0.3), binary(48, 33)
    whole = rbm.gibbs(v, 4, seed=9)
    assert torch.equal(rbm.gibbs(rbm.gibbs(v, 1, seed=9), 3, seed=9, step=2), whole)
    assert torch.equal(torch.cat([rbm.gibbs(v[i : i + 12], 4, seed=9, row_offset=i) for i in range(0, 48, 12)]), whole)
    assert torch.equal(rbm.gibbs(v.view(4, 12, 33), 4, seed=9).view(48, 33), whole)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    parts, gradient = [], torch.zeros_like(rbm.W)
    for rank in range(3):  # as three data-parallel processes with one seed: PCD chains and gradients of one process
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shard = make(33, 21, 0.3)
        rows = v[16 * rank : 16 * rank + 16]
        shard.start_chains(rows, seed=9)
        for _ in range(2):
            shard.zero_grad()
            shard.contrastive_divergence(rows, 2, persistent=True).backward()
        parts.append(shard.chains)
        gradient += shard.W.grad / 3
    assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(gradient, explicit_gradient(rbm, v, whole)[0])


def _train_data_parallel(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rbm = torch.nn.parallel.DistributedDataParallel(make(9, 5, 0.3))
    torch.manual_seed(5)
    data = binary(16, 9)[8 * rank : 8 * rank + 8]
    for _ in range(3):
        rbm.zero_grad()
        rbm(data, 2, persistent=True).backward()
    torch.save({"chains": rbm.module.chains, "gradient": rbm.module.W.grad}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel_is_one_process(tmp_path):
    torch.multiprocessing.spawn(_train_data_parallel, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    rbm = make(9, 5, 0.3)
    torch.manual_seed(5)
    for _ in range(3):
        rbm.zero_grad()
        rbm(binary(16, 9), 2, persistent=True).backward()
    assert torch.equal(torch.cat([rank["chains"] for rank in ranks]), rbm.chains)
    for rank in ranks:
        torch.testing.assert_close(rank["gradient"], rbm.W.grad, rtol=1e-12, atol=1e-14)


def test_compiles():
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    compiled = torch.compile(rbm.contrastive_divergence, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v, 2, seed=3), rbm.contrastive_divergence(v, 2, seed=3))
    compiled(v, 2, seed=3).backward()
    torch.testing.assert_close(rbm.W.grad, explicit_gradient(rbm, v, rbm.gibbs(v, 2, seed=3))[0])

    counter = torch._dynamo.testing.CompileCounter()
    persistent = torch.compile(rbm.contrastive_divergence, backend=counter)
    rbm.start_chains(v, seed=4)
    for _ in range(2):
        persistent(v, persistent=True)
    frames = counter.frame_count
    for _ in range(3):
        persistent(v, persistent=True)
    assert counter.frame_count == frames
    assert torch.equal(rbm.chains, rbm.gibbs(v, 5, seed=4))


def visible_distribution(rbm):
    return torch.softmax(-rbm.free_energy(all_states(rbm.visible)), 0)


def chi_square_p(rbm, v):
    """p-value of visible states v against the enumerated p(v)."""
    code = (v @ torch.tensor([2.0**i for i in reversed(range(rbm.visible))], dtype=v.dtype)).long()
    counts = torch.bincount(code, minlength=2**rbm.visible)
    expected = visible_distribution(rbm).detach() * len(v)
    assert expected.min() > 20
    return stats.chisquare(counts.numpy(), expected.numpy()).pvalue


def exact_sample(rbm, rows):
    generator = torch.Generator().manual_seed(4)
    index = torch.multinomial(visible_distribution(rbm).detach(), rows, True, generator=generator)
    return all_states(rbm.visible)[index]


@pytest.mark.parametrize("seed", range(5))
def test_gibbs_leaves_the_model_distribution_stationary(seed):
    """Independent chains from noise reach p(v); five seeds at p < 1e-4 each: false alarm 0.05% of seeds."""
    rbm = make(3, 2)
    v = rbm.gibbs(binary(20_000, 3, seed=seed + 10), 30, seed=seed)
    assert chi_square_p(rbm, v) > 1e-4
    assert chi_square_p(rbm, rbm.gibbs(exact_sample(rbm, 20_000), 1, seed=seed)) > 1e-4


def test_a_sampler_that_reuses_counters_fails_the_same_test():
    rbm = make(3, 2)
    v = exact_sample(rbm, 20_000)
    for _ in range(30):  # hidden and visible units share one half-step, as if the counter stood still
        v = rbm.sample_visible(rbm.sample_hidden(v, seed=0, step=0), seed=0, step=0)
    assert chi_square_p(rbm, v) < 1e-12


def test_training_raises_the_exact_likelihood():
    """CD on two patterns, judged by the enumerated log-likelihood: better than any factorized model."""
    torch.manual_seed(0)
    data = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).repeat(16, 1)
    rbm = RBM(6, 4)
    optimizer = torch.optim.SGD(rbm.parameters(), 0.2)
    for _ in range(400):
        optimizer.zero_grad()
        rbm.contrastive_divergence(data, persistent=True).backward()
        optimizer.step()
    with torch.no_grad():
        log_z = torch.logsumexp(-rbm.free_energy(all_states(6, torch.float32)), 0)
        likelihood = (-rbm.free_energy(data) - log_z).mean()
    assert likelihood > -1.2  # untrained and factorized: -6 log 2 = -4.16; the best possible: -log 2 = -0.69


def test_state_dict_and_module_behaviour():
    rbm = RBM(6, 4)
    assert set(rbm.state_dict()) == {"W", "b", "c", "chains", "_extra_state"}
    assert [tuple(p.shape) for p in (rbm.W, rbm.b, rbm.c)] == [(6, 4), (6,), (4,)]
    rbm.start_chains(torch.ones(3, 6), seed=2)
    rbm.double()
    assert rbm.chains.dtype == torch.float64
    rbm.reset_parameters()
    assert len(rbm.chains) == 0
    assert rbm.sample_hidden(torch.ones(2, 6, dtype=torch.uint8)).dtype == torch.float64


def test_bad_arguments():
    rbm, v = RBM(6, 4), torch.ones(2, 6)
    with pytest.raises(ValueError, match="at least 1"):
        RBM(0, 4)
    with pytest.raises(ValueError, match=r"\[\.\.\., 6\]"):
        rbm.free_energy(torch.ones(2, 5))
    with pytest.raises(TypeError, match="Tensor"):
        rbm.hidden_prob([1.0] * 6)
    with pytest.raises(ValueError, match="k must be"):
        rbm.contrastive_divergence(v, k=0)
    with pytest.raises(ValueError, match=r"\[B, V\]"):
        rbm.contrastive_divergence(v[0])
    with pytest.raises(ValueError, match="at least one row"):
        rbm.contrastive_divergence(v[:0])
    with pytest.raises(ValueError, match="2\\^32"):
        rbm.gibbs(v, 2, step=2**32 - 3)
    with pytest.raises(ValueError, match="binary"):
        rbm.pseudo_likelihood(v * 0.5)
    with pytest.raises(ValueError, match="units"):
        rbm.pseudo_likelihood(v, units=0)
