import pytest
import torch
from tiny import tiny_network
from torch import nn

from ediffi_core.training.optimizers import RMS, Muon, WhitenedAdamW, matrices, orthogonalised


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])  # in float32 and in bfloat16
def test_an_orthogonalised_matrix_has_singular_values_of_about_1(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert orthogonalised(torch.eye(2)).dtype == (torch.float32 if capability == "AVX2" else torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 16), (8, 64), (64, 8)):
        matrix = torch.randn(shape, generator=generator) * 100
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        result = orthogonalised(matrix).float()
        assert result.shape == shape
        assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.4
        along = torch.nn.functional.cosine_similarity(result.flatten(), (u @ vh).flatten(), dim=0)
        assert along > 0.97  # and its directions are the matrix's own


def test_matrices_that_are_turned_together_turn_as_alone():
    generator = torch.Generator().manual_seed(0)
    several = torch.randn(3, 24, 40, generator=generator) * torch.tensor([0.01, 1, 100])[:, None, None]
    for matrix, together in zip(several, orthogonalised(several).float(), strict=True):
        assert (orthogonalised(matrix).float() - together).abs().max() < 0.05  # of entries up to 0.4, in bfloat16


def test_an_update_is_as_large_as_one_by_adamw():
    parameter = nn.Parameter(torch.zeros(32, 4, 3, 3))
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    Muon([parameter], lr=0.1).step()
    assert abs(parameter.square().mean().sqrt().item() / (0.1 * RMS) - 1) < 0.15


def test_muon_finds_the_matrix_of_a_least_squares_problem():
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(256, 12, generator=generator), torch.randn(12, 6, generator=generator)
    weight = nn.Parameter(torch.zeros(12, 6))
    optimizer = Muon([weight], lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        ((x @ weight - x @ wanted) ** 2).mean().backward()
        optimizer.step()
    assert (weight - wanted).abs().max() < 0.02


def test_muon_trains_inner_matrices_only():
    network = tiny_network()
    shapes = dict(network.named_parameters())
    names = matrices(network)
    assert "middle.0.cross_attention.q.weight" in names
    assert "down.0.residual.conv_in.weight" in names
    assert not {"stem.weight", "conv_out.weight", "null.weight", "noise.dense_0.weight"} & names
    assert all(shapes[name].ndim in (2, 4) for name in names)


SETTINGS = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.01, "fused": True}


def lopsided_problem(seed=0):
    """What matters is the faint half of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    clean = torch.randn(512, 12, generator=generator)
    loudness = torch.tensor([1.0] * 6 + [0.01] * 6)
    return (clean * loudness) @ basis, clean[:, 6:], (basis.T / loudness) @ basis


def train(optimizer, weight, x, wanted, steps=150):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((x @ weight.T - wanted) ** 2).mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_behind_a_whitener_faint_inputs_are_learned():
    x, wanted, matrix = lopsided_problem()
    plain, white = nn.Parameter(torch.zeros(6, 12)), nn.Parameter(torch.zeros(6, 12))
    lost = train(torch.optim.AdamW([plain], **SETTINGS), plain, x, wanted)
    found = train(WhitenedAdamW([white], [matrix], **SETTINGS), white, x, wanted)
    assert lost > 0.8
    assert found < 0.05


def test_it_is_adamw_on_the_whitened_weight():
    """W = V P: V is trained by PyTorch's own AdamW, on inputs that P has whitened."""
    x, wanted, matrix = lopsided_problem(1)
    v = nn.Parameter(torch.randn(6, 12, generator=torch.Generator().manual_seed(2)))
    w = nn.Parameter(v.detach() @ matrix)
    train(torch.optim.AdamW([v], **SETTINGS), v, x @ matrix, wanted, 20)
    train(WhitenedAdamW([w], [matrix], **SETTINGS), w, x, wanted, 20)
    assert torch.allclose(w, v @ matrix, rtol=1e-3, atol=1e-3)


def test_weights_without_a_gradient_stay():
    weight = nn.Parameter(torch.ones(2, 3))
    WhitenedAdamW([weight], [torch.eye(3)], **SETTINGS).step()
    assert torch.equal(weight, torch.ones(2, 3))
