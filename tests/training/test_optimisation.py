"""Parameter groups, rates, and what a step of each optimiser does."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from tests.training.balls import TINY_SAM, config
from training.checkpoint import build_network
from training.config import Config
from training.muon import Muon, orthogonalised
from training.optimisation import Optimisation, rate_factor


def test_the_cosine_warms_up_and_ends_low() -> None:
    settings = config(warmup_steps=10, lr_end=0.01)
    factors = [rate_factor(settings, s, s / 1000, 0) for s in (0, 9, 500, 1000)]
    assert factors == pytest.approx([0.1, 1.0, 0.505, 0.01], rel=0.01)


def test_the_papers_rates_and_steps() -> None:
    paper = Path(__file__).parents[2] / "training" / "configs" / "paper.yaml"
    shape = [f"sam.{k}={v}" for k, v in TINY_SAM.items()]
    settings = Config.load(paper, shape)
    model = build_network(settings)
    optimisation = Optimisation(model, settings)
    (adamw,) = optimisation.optimisers
    encoder, others = adamw.param_groups
    count = sum(p.numel() for p in model.image_encoder.parameters())  # type: ignore[operator, union-attr]
    assert sum(p.numel() for p in encoder["params"]) == count
    for epoch, factor in ((0, 1), (119.99, 1), (120, 0.1), (179.99, 0.1), (180, 0.01)):
        optimisation.prepare(7, epoch / 200, epoch)
        assert encoder["lr"] == pytest.approx(8e-4 * factor)
        assert others["lr"] == pytest.approx(8e-5 * factor)
        assert encoder["weight_decay"] == others["weight_decay"] == 0.1
        assert encoder["betas"] == (0.9, 0.999)


def _after_a_step(
    optimizer: str, scale: float = 1.0, **values: float
) -> tuple[dict[str, torch.Tensor], ...]:
    """Weights of a refiner before a step of random gradients, and after."""
    torch.manual_seed(0)
    settings = config(optimizer=optimizer, lr=0.01, warmup_steps=0, **values)
    model = build_network(settings)
    before = copy.deepcopy(model.state_dict())
    optimisation = Optimisation(model, settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    scaler.scale(torch.zeros(()))
    optimisation.prepare(0, 0.0, 0.0)
    assert all(p.grad is None for p in model.parameters())
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack(norms).norm()) / scale
    assert optimisation.unscale(scaler) == pytest.approx(norm, rel=1e-4)
    optimisation.step(scaler)
    return before, dict(model.state_dict())


def test_muon_makes_the_changes_of_inner_convolutions_orthogonal() -> None:
    """Their singular values are about alike, a weight's change .2 of the rate in the mean."""
    before, after = _after_a_step("muon", weight_decay=0.0)
    with_adamw = _after_a_step("adamw", weight_decay=0.0)[1]
    inner = 0
    for name, old in before.items():
        change = after[name] - old
        if old.ndim < 2 or name.startswith(("stem.", "head.")):
            assert torch.equal(after[name], with_adamw[name]), name
            continue
        inner += 1
        matrix = change.flatten(1)
        values = torch.linalg.svdvals(matrix)
        assert values.min() > 0.4 * values.max(), name
        size = 0.2 * 0.01 * matrix.numel() ** 0.5
        # The iteration leaves singular values of .7 to 1.2 instead of 1.
        assert 0.68 < float(matrix.norm()) / size < 1.2, name
    assert inner == 8


def test_muon_does_what_the_library_does_and_goes_on_from_its_state() -> None:
    """But for bfloat16's rounding; tall and wide matrices, two of one shape, one at rest."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((24, 60), (60, 24), (24, 60), (7, 7))]
    ours, theirs = ([matrix.clone() for matrix in start] for _ in range(2))
    own = Muon(ours, 0.01)
    library = torch.optim.Muon(theirs, lr=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        if step == 2:
            own.load_state_dict(copy.deepcopy(library.state_dict()))
        for mine, other in zip(ours[:3], theirs[:3], strict=True):
            mine.grad = other.grad = torch.randn_like(mine)
        before = [matrix.clone() for matrix in ours[:3]]
        assert own.step() is None
        library.step()
        for mine, other, old in zip(ours[:3], theirs[:3], before, strict=True):
            assert (mine - other).norm() < 0.05 * (mine - old).norm(), step
            other.copy_(mine)
    assert torch.equal(ours[3], start[3])


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
def test_a_matrix_is_made_orthogonal_as_exactly_as_the_plain_iteration(smallest: float) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(32, 200), full_matrices=False)
    matrix = left * torch.logspace(0, math.log10(smallest), 32) @ right
    expected = matrix.double() / matrix.double().norm()
    for _ in range(5):
        square = expected @ expected.T
        expected = (3.4445 * torch.eye(32) - 4.775 * square + 2.0315 * square @ square) @ expected
    found = orthogonalised(matrix[None], (3.4445, -4.775, 2.0315), 5, 1e-7)[0]
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert orthogonalised(torch.zeros(2, 3, 4), (3.4445, -4.775, 2.0315), 5, 1e-7).abs().max() == 0


def test_weights_decay_with_both_optimisers() -> None:
    before, kept = _after_a_step("muon", weight_decay=0.0)
    _, decayed = _after_a_step("muon", weight_decay=0.5)
    for name in ("stem.weight", "encoder.0.0.conv1.weight"):
        expected = kept[name] - 0.01 * 0.5 * before[name]
        torch.testing.assert_close(decayed[name], expected, rtol=1e-4, atol=1e-6)
    name = "encoder.0.0.norm1.weight"
    assert torch.equal(decayed[name], kept[name]), "normalisation does not"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_scaled_loss_gives_the_same_step(optimizer: str) -> None:
    """As float16 needs it; gradients of matrices must not be unscaled twice, nor never."""
    _, plain = _after_a_step(optimizer)
    _, scaled = _after_a_step(optimizer, scale=1024.0)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, msg=name)


def test_the_state_of_other_optimisers_is_refused() -> None:
    model = build_network(config())
    state = Optimisation(model, config()).state()
    with pytest.raises(ValueError, match="of 1 optimisers; accepted: of 2, as optimizer is muon"):
        Optimisation(model, config(optimizer="muon")).load(state)
