"""nn.VectorQuantizer: running means, revival, k-means, cosine, images, resuming, and data parallelism."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn.functional import normalize

from genfast import nn, ops, random


def layer(codes=6, dim=3, **options):
    torch.manual_seed(1)
    return nn.VectorQuantizer(codes, dim, **{"seed": 3, "dtype": torch.float64, **options})


def batch(step, rows=40, dim=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, dim, generator=generator, dtype=dtype) * 0.3


def test_running_means_by_the_published_formulas():
    quantizer, decay, eps = layer(decay=0.8, eps=0.01), 0.8, 0.01
    codebook, counts = quantizer.codebook.clone(), torch.ones(6, dtype=torch.float64)
    sums = codebook.clone()
    for step in range(4):
        z = batch(step).requires_grad_()
        found = quantizer(z)
        indices = torch.cdist(z, codebook).argmin(1)
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.z_q, codebook[indices])  # of the codebook before the update
        torch.testing.assert_close(found.loss, 0.25 * (z - codebook[indices]).square().mean())
        (dz,) = torch.autograd.grad(found.loss, z)
        torch.testing.assert_close(dz, 0.5 * (z - codebook[indices]).detach() / z.numel())
        one_hot = torch.nn.functional.one_hot(indices, 6).double()
        counts = decay * counts + (1 - decay) * one_hot.sum(0)
        sums = decay * sums + (1 - decay) * one_hot.T @ z.detach()
        smoothed = (counts + eps) / (counts.sum() + 6 * eps) * counts.sum()
        codebook = sums / smoothed.unsqueeze(1)
        torch.testing.assert_close(quantizer.codebook, codebook)
        torch.testing.assert_close(quantizer.counts, counts)
    share = counts / counts.sum()
    torch.testing.assert_close(quantizer.perplexity().double(), (-(share * share.log()).sum()).exp())
    assert quantizer.updates.item() == 4


def test_eval_changes_nothing():
    quantizer = layer(revive_below=5.0).eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(batch(0))
    quantizer.train().encode(batch(0))
    quantizer(batch(0)[:0])
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_codebook_that_learns_by_gradients():
    quantizer = layer(decay=None)
    assert [name for name, _ in quantizer.named_parameters()] == ["codebook"]
    found = quantizer(batch(0))
    found.loss.backward()
    want = ops.vector_quantize(batch(0), quantizer.codebook)
    (gradient,) = torch.autograd.grad(want.loss, quantizer.codebook)
    assert torch.equal(quantizer.codebook.grad, gradient)
    assert gradient.any()
    losses = []
    optimizer = torch.optim.SGD(quantizer.parameters(), 2.0)
    for _ in range(30):
        optimizer.zero_grad()
        loss = quantizer(batch(0)).codebook_loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("decay", [0.9, None])
def test_dead_codes_move_to_vectors_of_this_batch(decay):
    quantizer = layer(decay=decay, revive_below=0.995)
    for step in range(3):
        with torch.no_grad():
            quantizer.codebook[3:] += 100.0  # nothing is near these
            quantizer.counts[3:] = 1.0
            if decay is not None:
                quantizer.sums.copy_(quantizer.codebook * quantizer.counts.unsqueeze(1))
        before = quantizer.counts.clone()
        z = batch(step) + step
        found = quantizer(z)
        counts = 0.9 * before + 0.1 * found.indices.bincount(minlength=6)
        if decay is None:
            counts = 0.99 * before + 0.01 * found.indices.bincount(minlength=6)
        dead = counts < 0.995
        assert dead[3:].all()
        codes = torch.arange(6)
        low, high = codes * 40 // 6, (codes + 1) * 40 // 6
        picks = low + ((high - low) * random.uniform(6, torch.tensor(3), step=step).double()).long()
        assert torch.equal(quantizer.codebook[dead], z[picks[dead]])
        assert torch.equal(quantizer.counts[dead], torch.full((6,), 1.99, dtype=torch.float64)[dead])
        torch.testing.assert_close(quantizer.counts[~dead], counts[~dead])
    assert quantizer.codebook.abs().max() < 10


def test_revival_fills_the_codebook():
    """Two clusters, and most codes far from both: without revival these stay dead."""
    z, used = torch.cat((batch(0, 100), batch(1, 100) + 20)), {}
    for threshold in (0.0, 1.0):
        quantizer = layer(16, revive_below=threshold, decay=0.7)
        quantizer.codebook[3:] += 500.0
        quantizer.sums.copy_(quantizer.codebook)
        for _ in range(15):
            found = quantizer(z)
        used[threshold] = found.indices.unique().numel(), found.commitment_loss.item()
    assert used[0.0][0] <= 4
    assert used[1.0][0] >= 14
    assert used[1.0][1] < used[0.0][1] / 2


def test_more_codes_than_vectors_and_distinct_picks():
    quantizer = layer(6, revive_below=10.0, decay=0.5)
    quantizer(batch(0))
    assert quantizer.codebook.unique(dim=0).shape[0] == 6
    quantizer = layer(50, revive_below=10.0, decay=0.5)
    quantizer(batch(0, 7))
    assert all((batch(0, 7) == code).all(1).any() for code in quantizer.codebook)


def test_kmeans_of_the_first_batch():
    centers = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [-5, 0, 0]], dtype=torch.float64)
    z = (centers + 0.1 * batch(0, 20)[:, None]).reshape(-1, 3)[torch.randperm(80)]
    quantizer = layer(4, init="kmeans", decay=0.99)
    first = quantizer(z)
    assert first.indices.bincount().tolist() == [20, 20, 20, 20]
    assert first.commitment_loss < 0.01
    means = torch.stack([z[first.indices == k].mean(0) for k in range(4)])
    torch.testing.assert_close(first.z_q, means[first.indices])
    assert quantizer.initialized
    state = quantizer.codebook.clone()
    quantizer(z + 1)
    assert (quantizer.codebook - state).abs().max() < 1.0, "not initialized again"
    again = layer(4, init="kmeans", decay=0.99)
    again.load_state_dict(quantizer.state_dict())
    again(z + 5)
    quantizer(z + 5)
    assert torch.equal(again.codebook, quantizer.codebook)


def test_cosine():
    quantizer = layer(cosine=True, decay=0.5, revive_below=0.4)
    for step in range(3):
        z = (batch(step) * 7).requires_grad_()
        codes = quantizer.codebook.clone()
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(6, dtype=torch.float64))
        found = quantizer(z)
        assert torch.equal(found.indices, (normalize(z, dim=1) @ codes.T).argmax(1))
        torch.testing.assert_close(found.z_q, codes[found.indices])
    (dz,) = torch.autograd.grad(found.z_q, z, torch.ones_like(z))
    (want,) = torch.autograd.grad(normalize(z, dim=1), z, torch.ones_like(z))
    torch.testing.assert_close(dz, want)
    learned = layer(cosine=True, decay=None)
    learned(batch(0)).loss.backward()
    assert learned.codebook.grad.any()


def test_images_with_channels_first():
    first, last = layer(channel_last=False, dtype=torch.float32), layer(dtype=torch.float32)
    z = torch.randn(2, 3, 4, 5)
    found, want = first(z), last(z.movedim(1, -1))
    assert torch.equal(found.z_q, want.z_q.movedim(-1, 1))
    assert torch.equal(found.indices, want.indices)
    assert found.indices.shape == (2, 4, 5)
    assert torch.equal(first.codebook, last.codebook)
    assert torch.equal(first.eval()(z).z_q, first.lookup(first.encode(z)))
    for shape in ((2, 3), (2, 3, 7), (2, 3, 1, 2, 2)):
        assert first(torch.randn(shape)).z_q.shape == shape
    half = first(z.bfloat16())
    assert half.z_q.dtype == torch.bfloat16
    assert torch.equal(half.indices, first.encode(z.bfloat16().float()))


@pytest.mark.parametrize("options", [{"revive_below": 1.0}, {"decay": None, "revive_below": 1.0}, {"init": "kmeans"}])
def test_resumes_bit_for_bit(options):
    def train(quantizer, steps):
        optimizer = torch.optim.SGD(quantizer.parameters(), 0.1) if list(quantizer.parameters()) else None
        for step in steps:
            loss = quantizer(batch(step, dtype=torch.float32)).loss
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    whole = layer(dtype=torch.float32, **options)
    train(whole, range(8))
    half = layer(dtype=torch.float32, **options)
    train(half, range(4))
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    resumed = nn.VectorQuantizer(6, 3, **options)  # another seed, another codebook
    resumed.load_state_dict(torch.load(file))
    train(resumed, range(4, 8))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_compile_in_training():
    quantizer = layer(dtype=torch.float32, revive_below=1.0)
    compiled = torch.compile(copy.deepcopy(quantizer), fullgraph=True, backend="aot_eager")
    for step in range(2):
        z = batch(step, dtype=torch.float32).requires_grad_()
        found, want = compiled(z), quantizer(z)
        assert torch.equal(found.indices, want.indices)
        torch.testing.assert_close(*(torch.autograd.grad(f.loss + f.z_q.sum(), z) for f in (found, want)))
        torch.testing.assert_close(compiled.codebook, quantizer.codebook)


def test_backward_after_the_update():
    for options in ({}, {"cosine": True}, {"decay": None, "revive_below": 1.0}, {"revive_below": 1.0}):
        quantizer = layer(**options)
        z = batch(0).requires_grad_()
        found = [quantizer(z), quantizer(z)]
        sum(f.loss + f.z_q.sum() for f in found).backward()
        assert z.grad.any()


def test_bad_arguments():
    for options, error in (
        ({"num_codes": 0}, ValueError), ({"num_codes": 2.0}, TypeError), ({"dim": 0}, ValueError),
        ({"decay": 1.0}, ValueError), ({"decay": -0.1}, ValueError), ({"decay": "a"}, TypeError),
        ({"eps": -1.0}, ValueError), ({"revive_below": -1.0}, ValueError), ({"beta": -1.0}, ValueError),
        ({"init": "zeros"}, ValueError), ({"kmeans_iterations": -1}, ValueError), ({"seed": 1.5}, TypeError),
        ({"dtype": torch.int64}, TypeError), ({"revive_below": float("nan")}, ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            nn.VectorQuantizer(**{"num_codes": 4, "dim": 3, **options})
    quantizer = nn.VectorQuantizer(4, 3)
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\]"):
        quantizer(torch.randn(2, 4))
    with pytest.raises(TypeError, match="int64"):
        quantizer(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN"):
        quantizer(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match=r"\[B, 3, \.\.\.\]"):
        nn.VectorQuantizer(4, 3, channel_last=False)(torch.randn(3))
    before = quantizer.codebook.clone()
    with pytest.raises(ValueError, match="meta"):
        quantizer(torch.zeros(2, 3, device="meta"))
    assert torch.equal(before, quantizer.codebook)


# ---- data parallelism ----

SCHEMES = {
    "running means": {},
    "revival": {"revive_below": 3.0, "decay": 0.7},
    "kmeans": {"init": "kmeans", "revive_below": 1.0},
    "cosine": {"cosine": True, "revive_below": 1.0},
    "gradients": {"decay": None, "revive_below": 1.0},
}


def train(module, share):
    quantizer = getattr(module, "module", module)
    parameters = list(quantizer.parameters())
    indices = []
    for step in range(4):
        z = batch(step, 50)[share].requires_grad_()
        found = module(z)
        found.loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
        indices.append(found.indices)
    return {**{name: value.detach() for name, value in quantizer.state_dict().items()}, "indices": torch.stack(indices)}


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, options in SCHEMES.items():
        quantizer = layer(16, **options)
        equal = name == "gradients"  # data parallelism takes means of gradients over ranks
        share = slice(25 * rank, 25 * rank + 25) if equal else slice(0, 13) if rank == 0 else slice(13, 50)
        if equal:
            quantizer = torch.nn.parallel.DistributedDataParallel(quantizer)
        results[name] = train(quantizer, share)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_training_is_one_process(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, options in SCHEMES.items():
        first, second = (rank[name] for rank in ranks)
        whole = train(layer(16, **options), slice(None))
        assert torch.equal(torch.cat((first["indices"], second["indices"]), 1), whole["indices"]), name
        for key in whole.keys() - {"indices"}:
            assert torch.equal(first[key], second[key]), (name, key)
            torch.testing.assert_close(first[key], whole[key], rtol=1e-11, atol=1e-13, msg=f"{name} {key}")
