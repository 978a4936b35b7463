"""Any weights file may be the start of a run; what does not fit is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from inference.model.refiner import CHANNELS, Refiner, RefinerConfig
from inference.model.sam_med3d import CONFIGS, SamMed3D, SamMed3DConfig
from inference.model.weights import WEIGHTS_DIR, save_weights
from training.initial_weights import initialise, read_checkpoint

TINY = RefinerConfig(channels=(8, 8), blocks=(1, 1), window=16)
SAM = SamMed3DConfig(
    image_size=32,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=2,
    global_blocks=(1,),
    window=6,
    prompt_width=48,
)


def noisy(model: nn.Module) -> nn.Module:
    """The network with every tensor random, none at its initialisation."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def write_checkpoint(path: Path, model: Refiner | SamMed3D, **changes: object) -> Path:
    """What training writes, the average being the network given."""
    kind = "refiner" if isinstance(model, Refiner) else "sam"
    state = {
        "model": {k: v + 1 for k, v in model.state_dict().items()},
        "average": model.state_dict(),
        "config": {"batch": 2, "windows": ((0.0, 16),)},
        "step": 7,
        "windows": 14,
        "minutes": 0.123,
        kind: dataclasses.asdict(model.config),
        **changes,
    }
    torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_network_of_fewer_channels_is_blind_to_the_new_one(tmp_path: Path, suffix: str) -> None:
    before, model = noisy(Refiner(TINY)), Refiner(TINY)
    state = before.state_dict()
    state["stem.weight"] = state["stem.weight"][:, :9].contiguous()
    path = tmp_path / f"old{suffix}"
    if suffix == ".pt":
        write_checkpoint(path, Refiner(TINY), average=state)
    else:
        named = {f"refiner.{n}": t for n, t in state.items()}
        save_weights(path, named, {"refiner": TINY.to_json()})
    assert initialise(model, path) == []
    assert model.stem.weight[:, :9].equal(state["stem.weight"])
    assert not model.stem.weight[:, 9:].any() and model.stem.weight.shape[1] == 11


@pytest.mark.parametrize("heard", [False, True])
def test_what_never_heard_a_first_pass_begins_deaf_to_it(tmp_path: Path, heard: bool) -> None:
    before = noisy(Refiner(dataclasses.replace(TINY, coarse=heard)))
    model = Refiner(dataclasses.replace(TINY, coarse=True))
    path = tmp_path / "before.safetensors"
    named = {f"refiner.{n}": t for n, t in before.state_dict().items()}
    save_weights(path, named, {"refiner": before.config.to_json()})
    initialise(model, path)
    heard_by = model.stem.weight[:, CHANNELS.index("coarse_logits")]
    assert bool(heard_by.any()) == heard
    assert model.stem.weight[:, 2:].equal(before.stem.weight[:, 2:])
    if heard:
        with pytest.raises(ValueError, match="accepted: a network with coarse true"):
            initialise(Refiner(TINY), path)


def test_the_default_weights_are_a_start() -> None:
    config = RefinerConfig(coarse=True)
    model, again = Refiner(config), Refiner(config)
    assert initialise(model, "default") == []
    initialise(again, WEIGHTS_DIR / "default.safetensors")
    assert equal(model, again)
    assert not equal(model, Refiner(config))


@pytest.mark.parametrize("kind", ["refiner", "sam"])
def test_a_checkpoints_average_is_a_start(tmp_path: Path, kind: str) -> None:
    def build() -> Refiner | SamMed3D:
        return Refiner(TINY) if kind == "refiner" else SamMed3D(SAM)

    source = noisy(build())
    model = build()
    assert initialise(model, write_checkpoint(tmp_path / "checkpoint.pt", source)) == []
    assert equal(model, source)


@pytest.mark.parametrize("kind", ["refiner", "sam"])
def test_either_network_of_a_bundle(tmp_path: Path, kind: str) -> None:
    networks = {"refiner": noisy(Refiner(TINY)), "sam": noisy(SamMed3D(SAM))}
    tensors = {f"{k}.{n}": t for k, m in networks.items() for n, t in m.state_dict().items()}
    metadata = {"refiner": TINY.to_json(), "sam": SAM.to_json()}
    save_weights(tmp_path / "both.safetensors", tensors, metadata)
    model = Refiner(TINY) if kind == "refiner" else SamMed3D(SAM)
    assert initialise(model, tmp_path / "both.safetensors") == []
    assert equal(model, networks[kind])


@pytest.mark.parametrize("unboxed", [True, False])
def test_a_run_without_boxes_starts_from_the_network_without(tmp_path: Path, unboxed: bool) -> None:
    networks = {"refiner": noisy(Refiner(TINY)), "unboxed": noisy(Refiner(TINY))}
    tensors = {f"{k}.{n}": t for k, m in networks.items() for n, t in m.state_dict().items()}
    path, model = tmp_path / "two.safetensors", Refiner(TINY)
    save_weights(path, tensors, dict.fromkeys(networks, TINY.to_json()))
    assert initialise(model, path, unboxed=unboxed) == []
    assert equal(model, networks["unboxed" if unboxed else "refiner"])
    alone = {n: t for n, t in tensors.items() if n.startswith("refiner.")}
    save_weights(path, alone, {"refiner": TINY.to_json()})
    assert initialise(model, path, unboxed=unboxed) == []
    assert equal(model, networks["refiner"])


@pytest.fixture(scope="module")
def wide() -> SamMed3D:
    """The paper's encoder width in its public form, with random weights."""
    torch.manual_seed(0)
    return SamMed3D(CONFIGS["vit_b_384"])


@pytest.fixture(scope="module")
def target() -> SamMed3D:
    return SamMed3D(CONFIGS["vit_b_384"])


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_a_public_checkpoint_is_a_start(
    tmp_path: Path, wide: SamMed3D, target: SamMed3D, suffix: str
) -> None:
    """Upstream's files: a state dict beside pickled extras, and no configuration."""
    path = tmp_path / f"sam_med3d_turbo.{suffix}"
    if suffix == "safetensors":
        save_weights(path, wide.state_dict(), {})
    else:
        extras = {"args": torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), "epoch": 3}
        torch.save({"model_state_dict": wide.state_dict(), **extras}, path)
    with torch.no_grad():
        for tensor in target.state_dict().values():
            tensor.zero_()
    assert initialise(target, path) == []
    assert equal(target, wide)

    with torch.device("meta"):
        config = dataclasses.replace(CONFIGS["vit_b_384"], relative_positions="aligned")
        corrected = SamMed3D(config)
    with pytest.raises(ValueError, match="its relative_positions is 'public', the network's 'alig"):
        initialise(corrected, path)


def test_parameters_named_as_new_keep_their_initialisation(tmp_path: Path) -> None:
    """A file from before there were embeddings of box corners, and a larger grid."""
    before = noisy(SamMed3D(dataclasses.replace(SAM, boxes=False)))
    path = tmp_path / "sam.safetensors"
    config = dataclasses.replace(SAM, boxes=False).to_json()
    save_weights(path, before.state_dict(), {"sam": config})
    corners = [f"prompt_encoder.point_embeddings.{i}.weight" for i in (2, 3)]

    with pytest.raises(ValueError, match=r"2 missing \(.*point_embeddings.2.*none are\)"):
        initialise(SamMed3D(SAM), path)
    model = SamMed3D(SAM)
    untouched = {name: model.state_dict()[name].clone() for name in corners}
    assert initialise(model, path, ["prompt_encoder.point_embeddings."]) == corners
    for name, tensor in model.state_dict().items():
        expected = untouched[name] if name in corners else before.state_dict()[name]
        assert torch.equal(tensor, expected), name

    larger = SamMed3D(dataclasses.replace(SAM, image_size=64, boxes=False))
    with pytest.raises(
        ValueError, match=r"4 of another shape .*image_encoder\.pos_embed \(1, 4, 4, 4"
    ):
        initialise(larger, path)
    fresh = initialise(larger, path, ["image_encoder."])
    assert "image_encoder.pos_embed" in fresh
    assert not any(name.startswith("mask_decoder") for name in fresh)


def test_what_is_left_over_is_named(tmp_path: Path) -> None:
    deep = Refiner(RefinerConfig(channels=(8, 8), blocks=(2, 1)))
    path = write_checkpoint(tmp_path / "checkpoint.pt", deep)
    with pytest.raises(ValueError, match=r"does not fit Refiner: 8 left over \(encoder\.0\.1\."):
        initialise(Refiner(TINY), path)
    initialise(model := Refiner(TINY), path, ["encoder.0.1."])
    assert torch.equal(model.head.weight, deep.head.weight)


def test_the_wrong_kind_is_said(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pt", Refiner(TINY))
    with pytest.raises(ValueError, match="a checkpoint of 'refiner'; accepted: 'sam'"):
        initialise(SamMed3D(SAM), path)
    with pytest.raises(ValueError, match="not SAM-Med3D weights"):
        initialise(SamMed3D(SAM), "default")
    save_weights(tmp_path / "sam.safetensors", SamMed3D(SAM).state_dict(), {"sam": SAM.to_json()})
    with pytest.raises(ValueError, match=r"no refiner in it \(metadata \['sam'\]\)"):
        initialise(Refiner(TINY), tmp_path / "sam.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights"):
        initialise(Refiner(TINY), tmp_path / "nothing.safetensors")


def test_a_checkpoint_is_read_without_running_it(tmp_path: Path) -> None:
    network = read_checkpoint(write_checkpoint(tmp_path / "a.pt", Refiner(TINY)))
    assert (network.kind, network.config) == ("refiner", TINY)
    assert network.training["steps"] == 7 and network.training["config"]["batch"] == 2

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"average": {}, "refiner": {}, "extra": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:500])
    torch.save({"model_state_dict": {}}, tmp_path / "other.pt")
    for name, message in {
        "evil.pt": "not a checkpoint: ",
        "short.pt": "not a checkpoint: ",
        "other.pt": r"received \['model_state_dict'\]; accepted: a checkpoint of training",
    }.items():
        with pytest.raises(ValueError, match=message) as raised:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()
