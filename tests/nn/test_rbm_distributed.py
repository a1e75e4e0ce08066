"""Data-parallel training of genfast.nn.RBM draws and learns what one process does."""

import pytest
import torch

from .rbm_helpers import binary, explicit_gradient, make

OPTIONS = {
    "cd": {},
    "pcd": {"persistent": True},
    "fast": {"persistent": True, "fast_rate": 0.05},
    "tempered": {"persistent": True, "tempering": [0.0, 0.5, 1.0]},
}
NAMES = ("W", "b", "c", "chains", "fast_W", "fast_b", "fast_c", "visible_offset", "hidden_offset")


def test_sharded_chains_are_one_process(monkeypatch):
    # float64, where a unit whose probability differs by rounding from its 24-bit uniform has odds of 1e-8
    rbm, v = make(33, 21, 0.3), binary(48, 33)
    whole = rbm.gibbs(v, 4, seed=9)
    fantasies = rbm.sample(48, 3, seed=9)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    chains, samples, gradient = [], [], torch.zeros_like(rbm.W)
    for rank in range(3):  # as three data-parallel processes with one seed: PCD chains and gradients of one process
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shard = make(33, 21, 0.3)
        rows = v[16 * rank : 16 * rank + 16]
        shard.start_chains(rows, seed=9)
        for _ in range(2):
            shard.zero_grad()
            shard.contrastive_divergence(rows, 2, persistent=True).backward()
        chains.append(shard.chains)
        samples.append(shard.sample(16, 3, seed=9))
        gradient += shard.W.grad / 3
    assert torch.equal(torch.cat(chains), whole)
    assert torch.equal(torch.cat(samples), fantasies)
    torch.testing.assert_close(gradient, explicit_gradient(rbm, v, whole)[0])


def train(rbm, rows, scheme, row_offset=None):
    """Four steps of a model or its DistributedDataParallel; returns its parameters, buffers and last loss."""
    module = getattr(rbm, "module", rbm)
    optimizer = torch.optim.SGD(module.parameters(), 0.2, momentum=0.5)
    torch.manual_seed(5)
    for _ in range(4):
        optimizer.zero_grad()
        loss = rbm(rows, 2, row_offset=row_offset, **OPTIONS[scheme])
        loss.backward()
        optimizer.step()
    state = {name: getattr(module, name).detach() for name in NAMES if getattr(module, name) is not None}
    return {**state, "loss": loss.detach()}


def _worker(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = binary(16, 9)[8 * rank : 8 * rank + 8]
    results = {}
    for scheme in OPTIONS:
        rbm = make(9, 5, 0.7, centered=True)
        results[scheme] = train(torch.nn.parallel.DistributedDataParallel(rbm), rows, scheme)
    mistaken = torch.nn.parallel.DistributedDataParallel(make(9, 5, 0.7, centered=True))
    results["mistaken"] = train(mistaken, rows, "pcd", row_offset=0)
    sharded = make(9, 5, 0.7, centered=True)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    train(sharded, rows, "fast")
    results["fully sharded"] = {name: parameter.full_tensor() for name, parameter in sharded.named_parameters()}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_and_fully_sharded_training_is_one_process(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for scheme in OPTIONS:
        whole = train(make(9, 5, 0.7, centered=True), binary(16, 9), scheme)
        first, second = (rank[scheme] for rank in ranks)
        assert first.keys() == second.keys() == whole.keys()
        assert torch.equal(torch.cat((first["chains"], second["chains"])), whole["chains"]), scheme
        torch.testing.assert_close((first["loss"] + second["loss"]) / 2, whole["loss"])
        for name in whole.keys() - {"chains", "loss"}:
            assert torch.equal(first[name], second[name]), (scheme, name)
            torch.testing.assert_close(first[name], whole[name], rtol=1e-11, atol=1e-13)
        if scheme == "fast":
            for rank in ranks:
                for name, parameter in rank["fully sharded"].items():
                    torch.testing.assert_close(parameter, whole[name], rtol=1e-11, atol=1e-13)
    whole = train(make(9, 5, 0.7, centered=True), binary(16, 9), "pcd")
    chains = torch.cat([rank["mistaken"]["chains"] for rank in ranks])  # both ranks with the noise of chains 0 to 7
    assert not torch.equal(chains, whole["chains"])
