"""Configurations: the shipped files, overrides, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from inference.model.refiner import RefinerConfig
from inference.model.sam_med3d import build_sam_med3d
from inference.model.weights import find_weights, read_metadata
from training.config import Config

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


def test_the_papers_table_is_in_its_file() -> None:
    config = Config.load(CONFIGS / "paper.yaml")
    assert config.init == "sam_med3d_turbo_bbox_init"
    assert (config.batch, config.accumulate, config.batch * config.accumulate) == (12, 20, 240)
    assert (config.sam.image_size, config.epochs, config.betas) == (128, 200, (0.9, 0.999))
    assert (config.lr, config.lr_prompts, config.weight_decay) == (8e-4, 8e-5, 0.1)
    assert (config.schedule, config.lr_gamma, config.milestones) == ("multistep", 0.1, (120, 180))
    assert (config.rounds, config.pointless_rounds, config.clicks) == (11, 2, "random")
    model = build_sam_med3d(config.sam)
    millions = sum(p.numel() for p in model.image_encoder.parameters()) / 1e6
    assert round(millions) == 93


def test_the_default_weights_were_trained_as_their_file_says() -> None:
    told = Config.load(CONFIGS / "default.yaml").to_dict()
    training = json.loads(read_metadata(find_weights())["refiner_training"])
    run = Config.from_dict(training["config"]).to_dict()
    assert told.pop("steps") == training["steps"]
    # The run itself ended by the clock; and where it began is said in the file's first lines.
    ran = {key: run.pop(key) for key in ("steps", "minutes", "checkpoint_minutes", "init")}
    assert ran["minutes"] == pytest.approx(training["minutes"], abs=0.5)
    assert run == {key: told[key] for key in run}


@pytest.mark.parametrize("name", ["small.yaml"])
def test_what_goes_on_from_the_default_weights_is_their_network(name: str) -> None:
    config = Config.load(CONFIGS / name)
    assert config.init == "default"
    shipped = RefinerConfig.from_json(read_metadata(find_weights())["refiner"], "it")
    assert dataclasses.replace(config.refiner, window=shipped.window) == shipped


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    import yaml

    config = Config.load(CONFIGS / "paper.yaml", ["sam.embed_dim=384", "windows=[[0.0, 64]]"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    assert Config.load(path) == config


def test_overrides_beat_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("lr: 0.1\nbatch: 3\nwindows: [[0.0, 32]]\nsam: {depth: 3}\n", encoding="utf-8")
    config = Config.load(path, ["lr=0.2", "sam.global_blocks=[2]", "init=null"])
    assert (config.lr, config.batch, config.windows) == (0.2, 3, ((0.0, 32),))
    assert (config.sam.depth, config.sam.global_blocks, config.init) == (3, (2,), None)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("nonsense=1", r"received \['nonsense'\]; accepted: \['network'"),
        ("sam.nonsense=1", r"sam received \['nonsense'\]; accepted: \['image_size'"),
        ("lr", "'lr'; accepted: key=value"),
        ("lr=1e-3", "YAML takes 1.0e-3, not 1e-3"),
        ("batch=2.5", "batch is 2.5; accepted: int"),
        ("batch=0", "batch is 0; accepted: at least 1"),
        ("warp=2.0", r"warp is 2.0; accepted: 0\.\.1"),
        ("network=unet", "accepted: one of"),
        ("windows=[[0.0, 40]]", "accepted: multiples of 16"),
        ("windows=[[0.5, 48]]", "accepted: pairs, the first at 0.0"),
        ("windows=[[0.0, 0]]", "accepted: multiples of 16"),
        ("windows=48", r"windows is 48; accepted: \[\[a number, int\], \.\.\.\]"),
        ("windows=[48]", r"windows is \[48\]; accepted: \[\[a number"),
        ("windows=[[0.0, 48]", r"--set windows=\[\[0.0, 48\]: while parsing .*; accepted: YAML"),
        ("milestones=100", r"milestones is 100; accepted: \[a number"),
        ("betas=[0.9]", r"betas is \[0.9\]; accepted: \[a number, a number\]"),
        ("lr_prompts=fast", "lr_prompts is 'fast'; accepted: a number or null"),
        ("init=3", "init is 3; accepted: text or null"),
        ("refiner=3", "refiner is 3; accepted: keys and values"),
        ("refiner.blocks=3", "blocks is 3; accepted"),
        (
            "windows=[[0.0, 16], [7.0, 32]]",
            "accepted: pairs, the first at 0.0, the others ascending",
        ),
        ("windows=[[0.0, 16], [0.5, 32], [0.5, 48]]", "ascending from there to below 1"),
        ("betas=[1.5, 0.9]", r"betas is \(1.5, 0.9\); accepted: from 0 to below 1"),
        ("clip_norm=-1.0", "clip_norm is -1.0; accepted: at least 0"),
        ("warmup_steps=-5", "warmup_steps is -5; accepted: at least 0"),
        ("weight_decay=.nan", "weight_decay is nan; accepted: at least 0"),
        ("lr=0.0", "lr is 0.0; accepted: above 0"),
        ("lr_prompts=.inf", "lr_prompts is inf; accepted: above 0"),
        ("box_scale=[-1.0, -0.5]", "accepted: least and most, above 0"),
        ("modality_weights=[[CT, -1.0]]", "modality_weights is .*; accepted: 0 and more"),
        ("steps=0", "epochs is 0, steps 0; accepted"),
        ("minutes=0", "minutes is 0; accepted: null, or above 0"),
        ("no_mask=-0.1", r"no_mask is -0.1; accepted: 0\.\.1"),
        ("pointless_rounds=6", "pointless_rounds is 6 of 6 rounds"),
    ],
)
def test_what_no_run_can_be_made_from_is_refused(pair: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.load(None, [pair])


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text, message in (
        ("- lr", "received list; accepted: keys"),
        ("a: [", "accepted: YAML"),
        ("1: 2\nfoo: 3", r"received \['1', 'foo'\]; accepted"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as caught:
            Config.load(path)
        assert "\n" not in str(caught.value)


def test_a_loss_has_a_term() -> None:
    with pytest.raises(ValueError, match="accepted: one above 0"):
        Config.load(None, ["dice=0", "cross_entropy=0"])


def test_muon_is_for_the_refiner() -> None:
    with pytest.raises(ValueError, match="muon, network sam_med3d; accepted: refiner"):
        Config.load(None, ["optimizer=muon", "network=sam_med3d"])


def test_synthetic_shares_may_not_exceed_one() -> None:
    with pytest.raises(ValueError, match="more than 1"):
        Config.load(None, ["synthetic=0.6", "shapes=0.6"])
