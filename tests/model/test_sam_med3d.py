"""SAM-Med3D against golden tensors of the upstream code, and its own contract."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inference.model.prompt_encoder import PositionEncoding
from inference.model.sam_med3d import (
    CONFIGS,
    SamMed3D,
    SamMed3DConfig,
    build_sam_med3d,
    load_sam_med3d,
)
from inference.model.weights import save_weights
from tests.conftest import CHECKOUT

TOLERANCE = 1e-4
TINY = SamMed3DConfig(
    image_size=64,
    embed_dim=96,
    depth=4,
    num_heads=4,
    global_blocks=(1, 3),
    prompt_width=96,
)
#: Small enough for tests without golden tensors.
SMALL = SamMed3DConfig(
    image_size=32,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=2,
    global_blocks=(1,),
    window=6,
    prompt_width=48,
)
PROMPTS = {
    "points": ("points",),
    "boxes": ("boxes",),
    "points_mask": ("points", "masks"),
    "points_boxes_mask": ("points", "boxes", "masks"),
}


@pytest.fixture(scope="module")
def golden(shared_golden: Path) -> dict[str, Tensor]:
    return load_file(shared_golden / "tiny_io.safetensors")


@pytest.fixture(scope="module")
def tiny(shared_golden: Path) -> SamMed3D:
    return build_sam_med3d(TINY, load_file(shared_golden / "tiny_state_dict.safetensors")).eval()


@pytest.fixture(scope="module")
def small() -> SamMed3D:
    torch.manual_seed(1)
    return build_sam_med3d(SMALL).eval()


def prompts_of(golden: dict[str, Tensor], kinds: tuple[str, ...]) -> dict[str, object]:
    every = {
        "points": (golden["point_coords"], golden["point_labels"]),
        "boxes": golden["boxes"],
        "masks": golden["mask_input"],
    }
    return {kind: every[kind] if kind in kinds else None for kind in every}


def close(result: Tensor, expected: Tensor) -> bool:
    assert result.shape == expected.shape
    return bool((result - expected).abs().max() < TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes(shared_golden: Path, name: str) -> None:
    expected = json.loads((shared_golden / "state_dict_shapes.json").read_text(encoding="utf-8"))[
        name
    ]
    with torch.device("meta"):
        state = build_sam_med3d(name).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == expected


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_b_768", (92.9, 0.01, 7.6)), ("vit_b_384", (27.2, 0.01, 7.6))]
)
def test_parameters(name: str, millions: tuple[float, float, float]) -> None:
    with torch.device("meta"):
        model = build_sam_med3d(name)
    parts = (model.image_encoder, model.prompt_encoder, model.mask_decoder)
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert counts == pytest.approx(millions, abs=0.05)


def test_golden_image_encoder(tiny: SamMed3D, golden: dict[str, Tensor]) -> None:
    seen: dict[str, Tensor] = {}

    def watch(i: int, block: nn.Module) -> RemovableHandle:
        def record(_: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
            seen[f"before_{i}"], seen[f"after_{i}"] = arguments[0], out

        return block.register_forward_hook(record)

    hooks = [watch(i, block) for i, block in enumerate(tiny.image_encoder.blocks)]
    with torch.no_grad():
        embedding = tiny.image_encoder(golden["image"])
    for hook in hooks:
        hook.remove()
    assert close(seen["before_0"], golden["block_input"])
    for i in range(TINY.depth):
        assert close(seen[f"after_{i}"], golden[f"after_block_{i}"])
    assert close(embedding, golden["image_embeddings"])


def test_golden_is_public_and_not_aligned(tiny: SamMed3D, golden: dict[str, Tensor]) -> None:
    """Both quirks are visible in the golden tensors: without them they are missed by far."""
    aligned = SamMed3DConfig(
        **{**vars(TINY), "relative_positions": "aligned", "dense_grid": "aligned"}
    )
    model = build_sam_med3d(aligned, tiny.state_dict()).eval()
    with torch.no_grad():
        embedding = model.image_encoder(golden["image"])
    assert (embedding - golden["image_embeddings"]).abs().max() > 0.1
    dense = model.prompt_encoder.get_dense_pe()
    assert (dense - golden["dense_pe"]).abs().max() > 0.1
    assert close(dense.transpose(2, 3), golden["dense_pe"])


@pytest.mark.parametrize("name", PROMPTS)
def test_golden_prompts_and_masks(tiny: SamMed3D, golden: dict[str, Tensor], name: str) -> None:
    prompts = prompts_of(golden, PROMPTS[name])
    with torch.no_grad():
        sparse, dense = tiny.prompt_encoder(**prompts)
        assert close(sparse, golden[f"{name}.sparse"])
        assert close(dense, golden[f"{name}.dense"])
        assert close(tiny.prompt_encoder.get_dense_pe(), golden["dense_pe"])
        for multimask in (False, True):
            masks, iou = tiny.mask_decoder(
                image_embeddings=golden["image_embeddings"],
                image_pe=golden["dense_pe"],
                sparse_prompt_embeddings=golden[f"{name}.sparse"],
                dense_prompt_embeddings=golden[f"{name}.dense"],
                multimask_output=multimask,
            )
            key = f"{name}.multimask_{str(multimask).lower()}"
            assert close(masks, golden[f"{key}.low_res_masks"])
            assert close(iou, golden[f"{key}.iou"])


@pytest.mark.parametrize("name", PROMPTS)
def test_golden_end_to_end(tiny: SamMed3D, golden: dict[str, Tensor], name: str) -> None:
    with torch.no_grad():
        embedding = tiny.encode_image(golden["image"])
        masks, iou = tiny.decode(
            embedding, **prompts_of(golden, PROMPTS[name]), multimask_output=True
        )
    assert close(masks, golden[f"{name}.multimask_true.low_res_masks"])
    assert close(iou, golden[f"{name}.multimask_true.iou"])


def test_golden_in_bfloat16(tiny: SamMed3D, golden: dict[str, Tensor]) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embedding = tiny.encode_image(golden["image"])
        masks, _ = tiny.decode(embedding, (golden["point_coords"], golden["point_labels"]))
    expected = golden["points.multimask_false.low_res_masks"]
    error = (masks.float() - expected).pow(2).mean().sqrt() / expected.std()
    assert error < 0.05


def points(objects: int, number: int) -> tuple[Tensor, Tensor]:
    return torch.rand(objects, number, 3) * 32, torch.randint(0, 2, (objects, number))


def test_prompts_on_one_image_and_images_with_prompts(small: SamMed3D) -> None:
    images = torch.randn(3, 1, 32, 32, 32)
    coords, labels = points(3, 2)
    boxes = torch.tensor([[1, 2, 3, 20, 21, 22.0]]).expand(3, -1)
    masks = torch.randn(3, 1, 16, 16, 16)
    with torch.no_grad():
        embedding = small.encode_image(images)
        several = small.decode(embedding, (coords, labels), boxes, masks)
        for i in range(3):
            this = slice(i, i + 1)
            alone = small.decode(
                embedding[this], (coords[this], labels[this]), boxes[:1], masks[this]
            )
            on_one = small.decode(embedding[this], (coords, labels), boxes, masks)
            for result in (several, on_one):
                assert (result[0][i] - alone[0][0]).abs().max() < 1e-5
                assert (result[1][i] - alone[1][0]).abs().max() < 1e-5
    assert several[0].shape == (3, 1, 16, 16, 16)
    assert several[1].shape == (3, 1)


def test_one_prompt_or_none_on_several_images(small: SamMed3D) -> None:
    with torch.no_grad():
        embedding = small.encode_image(torch.randn(2, 1, 32, 32, 32))
        for prompt in (None, points(1, 1)):
            masks, iou = small.decode(embedding, prompt, multimask_output=True)
            assert masks.shape == (2, 3, 16, 16, 16)
            assert iou.shape == (2, 3)
            alone, _ = small.decode(embedding[1:], prompt, multimask_output=True)
            assert (masks[1:] - alone).abs().max() < 1e-5


def test_a_filler_is_a_filler(small: SamMed3D) -> None:
    """The coordinates of a point with label -1 do not matter."""
    coords, labels = points(1, 3)
    labels[0, 2] = -1
    moved = coords.clone()
    moved[0, 2] += 5
    with torch.no_grad():
        embedding = small.encode_image(torch.randn(1, 1, 32, 32, 32))
        masks = [small.decode(embedding, (c, labels))[0] for c in (coords, moved)]
    assert torch.equal(*masks)


def test_points_follow_the_axes_of_the_window() -> None:
    """A point and the dense grid: the same triple, but for the swap of public checkpoints."""
    for dense_grid, order in (("aligned", (0, 1, 2)), ("public", (1, 0, 2))):
        config = SamMed3DConfig(**{**vars(SMALL), "dense_grid": dense_grid})
        encoder = build_sam_med3d(config).prompt_encoder
        token = torch.tensor([3, 0, 1])
        centre = 8 * token[list(order)] + 3.5  # of the 8^3 voxels of a token
        encoded = encoder.pe_layer((centre + 0.5) / 32)
        assert (encoder.get_dense_pe()[0, :, 3, 0, 1] - encoded).abs().max() < 1e-4
        sparse, _ = encoder(points=(centre[None, None], torch.ones(1, 1, dtype=torch.int64)))
        point = sparse[0, 0] - encoder.point_embeddings[1].weight[0]
        assert (point - encoded).abs().max() < 1e-4


def test_positions_keep_their_precision_under_autocast() -> None:
    encoding = PositionEncoding(16)
    position = torch.rand(10, 3)
    expected = encoding(position)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoding(position), expected)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"points": (torch.zeros(1, 2, 2), torch.zeros(1, 2))}, "must be"),
        ({"points": (torch.zeros(1, 2, 3), torch.zeros(1, 3))}, "must be"),
        ({"points": (torch.zeros(1, 2, 3), torch.full((1, 2), 2))}, r"point labels \[2\]"),
        ({"boxes": torch.zeros(1, 4)}, r"boxes of shape \(1, 4\)"),
        ({"masks": torch.zeros(1, 1, 8, 8, 8)}, r"must be \(B, 1, 16, 16, 16\)"),
        ({"boxes": torch.zeros(2, 6), "masks": torch.zeros(3, 1, 16, 16, 16)}, "disagree"),
        ({"boxes": torch.zeros(2, 6)}, "'images': 3"),
    ],
)
def test_prompts_that_are_refused(
    small: SamMed3D, prompts: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small.decode(torch.zeros(3, 48, 4, 4, 4), **prompts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 100}, "image_size is 100: not a multiple of 16"),
        ({"num_heads": 7}, "embed_dim is 768"),
        ({"depth": 0}, "depth is 0"),
        ({"window": 14.0}, "window is 14.0"),
        ({"prompt_width": 100}, "multiple of 48"),
        ({"global_blocks": (12,)}, "blocks are 0..11"),
        ({"relative_positions": "wrong"}, "relative_positions is 'wrong'"),
        ({"dense_grid": "wrong"}, "dense_grid is 'wrong'"),
        ({"boxes": 1}, "boxes is 1"),
        ({"embed_dim": True}, "embed_dim is True"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamMed3DConfig(**change)  # type: ignore[arg-type]


def test_configuration_as_json() -> None:
    for config in (TINY, SMALL, *CONFIGS.values()):
        assert SamMed3DConfig.from_json(config.to_json(), "a file") == config
    for text in ('{"widht": 3}', "[]"):
        with pytest.raises(ValueError, match=r"^a file: SamMed3DConfig .*accepted: image_size, pa"):
            SamMed3DConfig.from_json(text, "a file")
    with pytest.raises(ValueError, match="'vit_h': one of vit_b_768, vit_b_384"):
        build_sam_med3d("vit_h")


def test_building_from_a_state_copies_nothing(small: SamMed3D) -> None:
    state = small.state_dict()
    model = build_sam_med3d(SMALL, state)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loading_from_a_bundle(small: SamMed3D, tmp_path: Path) -> None:
    tensors = {f"sam.{name}": tensor for name, tensor in small.state_dict().items()}
    path = tmp_path / "bundle.safetensors"
    save_weights(path, {**tensors, "refiner.stem": torch.ones(1)}, {"sam": SMALL.to_json()})
    model = load_sam_med3d(path)
    assert model.config == SMALL
    assert not model.training
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.encode_image(image), small.encode_image(image))


@pytest.mark.parametrize("boxes", [True, False])
def test_a_public_checkpoint_is_known_by_its_shapes(tmp_path: Path, boxes: bool) -> None:
    with torch.device("meta"):
        state = build_sam_med3d("vit_b_384").state_dict()
    zeros = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}
    if not boxes:
        del zeros["prompt_encoder.point_embeddings.2.weight"]
        del zeros["prompt_encoder.point_embeddings.3.weight"]
    torch.save({"model_state_dict": zeros, "epoch": 3}, tmp_path / "public.pth")
    model = load_sam_med3d(tmp_path / "public.pth")
    assert model.config == dataclasses.replace(CONFIGS["vit_b_384"], boxes=boxes)


def test_a_network_without_box_corners() -> None:
    model = build_sam_med3d(dataclasses.replace(SMALL, boxes=False))
    embedding = torch.zeros(1, 48, 4, 4, 4)
    with torch.no_grad():
        assert model.decode(embedding, points(1, 2))[0].shape == (1, 1, 16, 16, 16)
    with pytest.raises(ValueError, match="points and masks only"):
        model.decode(embedding, boxes=torch.zeros(1, 6))


def test_other_weights_are_refused(small: SamMed3D, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    for tensors in ({"stem.weight": torch.ones(1)}, small.state_dict()):
        save_weights(path, tensors, {})
        with pytest.raises(ValueError, match="not SAM-Med3D weights"):
            load_sam_med3d(path)


def test_loading_imports_nothing_more(small: SamMed3D, tmp_path: Path) -> None:
    """A cold start does not pay for PyTorch's compiler or SymPy (a second)."""
    path = tmp_path / "small.safetensors"
    save_weights(path, small.state_dict(), {"sam": SMALL.to_json()})
    code = (
        "import sys, torch, pathlib; before = set(sys.modules)\n"
        "from inference.model.sam_med3d import load_sam_med3d\n"
        "model = load_sam_med3d(pathlib.Path(sys.argv[1]))\n"
        "with torch.inference_mode():\n"
        "    model.decode(model.encode_image(torch.zeros(1, 1, 32, 32, 32)))\n"
        "new = set(sys.modules) - before\n"
        "print(*sorted({name.split('.')[0] for name in new} | (new & {'torch._dynamo'})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=CHECKOUT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    modules = set(done.stdout.split())
    assert {"inference", "safetensors"} <= modules
    assert not modules & {"sympy", "torch._dynamo", "urllib", "ssl"}
