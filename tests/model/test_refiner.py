"""The refiner by itself: what it ignores, and what it cannot take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inference.model.refiner import CHANNELS, Refiner, RefinerConfig, load_refiners
from inference.model.weights import save_weights


def test_weights_from_before_a_channel_ignore_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    refiner = Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)).eval()
    torch.nn.init.normal_(refiner.head.weight)
    seen = torch.randn(1, len(CHANNELS), 8, 8, 8)
    seen[:, 9:] = 0
    expected = refiner(seen)
    state = {f"refiner.{n}": t for n, t in refiner.state_dict().items()}
    state["refiner.stem.weight"] = state["refiner.stem.weight"][:, :9].contiguous()
    path = tmp_path / "old.safetensors"
    save_weights(path, state, {"refiner": refiner.config.to_json()})
    old, _ = load_refiners(path)
    assert old(seen).equal(expected)
    seen[:, 9:] = 1
    assert old(seen).equal(expected) and not refiner(seen).equal(expected)


def test_weights_from_before_a_second_pass_start_from_none_of_its_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    refiner = Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)).eval()
    seen = torch.randn(1, len(CHANNELS), 8, 8, 8)
    state = {f"refiner.{n}": t for n, t in refiner.state_dict().items()}
    state["refiner.base"] = state["refiner.base"][:3].contiguous()
    path = tmp_path / "old.safetensors"
    save_weights(path, state, {"refiner": refiner.config.to_json()})
    old, _ = load_refiners(path)
    coarse = seen[:, [CHANNELS.index("coarse_logits")]]
    torch.testing.assert_close(refiner(seen), old(seen) + coarse)


def test_a_refiner_may_be_blind_to_a_channel() -> None:
    torch.manual_seed(0)
    config = RefinerConfig(channels=(8, 8), blocks=(1, 1), without=("likelihood",))
    refiner = Refiner(config)
    torch.nn.init.normal_(refiner.head.weight)
    seen = torch.randn(1, len(CHANNELS), 8, 8, 8)
    other = seen.clone()
    other[:, CHANNELS.index("likelihood")] = 9
    assert torch.equal(refiner(seen), refiner(other))
    other[:, CHANNELS.index("box")] = 9
    assert not torch.equal(refiner(seen), refiner(other))
    assert RefinerConfig.from_json(config.to_json(), "a file") == config
    with pytest.raises(ValueError, match=r"without is \['hearing'\]; accepted: image, "):
        RefinerConfig(without=("hearing",))


@pytest.mark.parametrize(
    "sizes",
    [
        {"blocks": [2, 2, 6, 100_000_000]},
        {"blocks": [2, 2]},
        {"channels": [32, 64, 96, 100]},
        {"channels": [], "blocks": []},
        *({"window": n} for n in (63, 0, -64, 100_000, "64", 64.0)),
    ],
)
def test_sizes_that_no_network_has_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^a file: .*: channels .*; accepted: as many blocks"):
        RefinerConfig.from_json(json.dumps(sizes), "a file")


@pytest.mark.parametrize("text", ["{", '{"channels": 5}'])
def test_what_is_no_configuration_is_refused_by_its_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a file: RefinerConfig "):
        RefinerConfig.from_json(text, "a file")


def test_the_refiner_names_the_shape_it_cannot_take() -> None:
    refiner = Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1)))
    with pytest.raises(ValueError, match=r"received \(30, 32, 32\); accepted: multiples of 4"):
        refiner(torch.zeros(1, len(CHANNELS), 30, 32, 32))
    with pytest.raises(ValueError, match=r"accepted: \(B, 11, D, H, W\)"):
        refiner(torch.zeros(1, 3, 32, 32, 32))
