"""One frozen training configuration, read from YAML, overridable by key=value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from inference.model.refiner import RefinerConfig
from inference.model.sam_med3d import SamMed3DConfig

_WORKER_PLACES = 8  # at most


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. ``configs/`` holds the paper's settings, ours and a small one.

    Attributes:
        network: what is trained; ``refiner`` and ``sam`` say its shape.
        init: weights to start from: a file, or the name of one in ``weights/``; None for none.

        steps: optimiser steps, where ``epochs`` is 0.
        epochs: passes over all objects; beats ``steps``.
        minutes: wall-clock minutes, counted over resumed runs, after which a run ends and which
            its schedule then follows where they are further on than the steps; None for no limit.
            A run with a limit is not reproducible to the bit.
        batch: windows of a forward pass, a process.
        accumulate: forward passes of an optimiser step.
        workers: processes that make the refiner's windows and clicks, each on a core of its own,
            while the network computes on a GPU; 0 where the network's process makes them, on its
            device. A run with workers is not reproducible to the bit.
        sampling: ``"balanced"``: by modality, dataset, case and object; ``"epochs"``: each object
            once an epoch, in random order.
        modality_weights: share of the windows each modality gets in balanced sampling; those not
            named get none.
        hard: exponent of the preference for datasets with low Dice so far, in balanced sampling.

        windows: (progress, edge in cells) pairs: the refiner's window from that progress (0..1)
            on. Inference uses the last one. SAM-Med3D's is ``sam.image_size``.
        box_scale: range of the window's edge in boxes.
        no_box: probability that an object comes without a box.
        others: probability that the other objects of a volume have prompts, too.
        sloppy_box: probability that each face of a box is off by some percent.
        zoom: probability of a close look at a part of a large object in a real image, after a first
            one at all of it: the second pass. With ``refiner.coarse`` it is shown the first one's
            logits.
        synthetic, supervoxels, shapes: probabilities of an image painted on a label map, of a
            supervoxel of a real image as the object, and of a painted random shape.
        joined: probability that an object is taken for one with another one beside it.
        flip: probability for each axis; permute: of permuted axes; warp: of a rotated, sheared
            and elastically deformed window.
        upright: probability that a window of CT or MR is neither permuted nor flipped but from left
            to right (x): which way is up tells what an organ is.
        gamma, inversion, low_resolution, blur, shading, noise: probabilities of these changes of
            intensities.

        rounds: refiner: an object is kept for 1 to this many rounds. SAM-Med3D: prompts of each.
        pointless_rounds: of SAM-Med3D's rounds, so many carry no points: the last one, and others
            at random after the second.
        clicks: ``"deep"``: near the deepest point of the largest error, as in the challenge;
            ``"random"``: anywhere in the error, as in the paper.
        click_slack: 0 for the deepest point itself, 1 for anywhere in the component.
        no_click: probability of a refiner's round without a new click.
        poor_mask: probability that a refiner's mask is made worse before the next round: drawn
            towards the ellipsoid after a box alone, else coarse and noisy.
        tell_apart: probability that a refiner's mask is otherwise what intensities make of it where
            inference lets objects side by side tell each other apart.
        no_mask: probability that a refiner's round after a click is not shown the last mask.
        previous_mask: SAM-Med3D's previous mask: ``"logits"`` (the paper) or ``"binary"`` (what
            inference has, but that it shows no mask where the last one is empty).

        dice, cross_entropy, focal, boundary, iou: weights of the terms of the loss; ``boundary``
            of cross-entropy within two cells of the surface, ``iou`` of SAM-Med3D's prediction of
            its own overlap.
        focal_gamma: exponent of the focal loss.

        optimizer: ``"adamw"``, or the refiner's ``"muon"``: see optimisation.py.
        lr: learning rate; of the image encoder, for SAM-Med3D.
        lr_prompts: of SAM-Med3D's prompt encoder and mask decoder; None for ``lr``.
        schedule: ``"cosine"`` to ``lr_end * lr``, or ``"multistep"``: times ``lr_gamma`` at each
            of the ``milestones`` (epochs).
        warmup_steps: linear; 0 for none.
        weight_decay: of both optimisers; ``decay_all``: of biases and normalisation, too.
        betas: of AdamW.
        clip_norm: largest gradient norm; 0 for no limit.
        ema: decay of the exponential moving average that is exported; 0 for none.
        precision: ``"auto"`` is bfloat16 where hardware has it (float16 on old cards).
        most_skipped: steps without finite loss or gradient in a row before the run stops.

        log_steps: steps between two lines of the log.
        checkpoint_minutes: between two checkpoints.
        tensorboard: write TensorBoard's event files too, where it is installed.
        seed: of everything random.
    """

    network: Literal["refiner", "sam_med3d"] = "refiner"
    refiner: RefinerConfig = dataclasses.field(default_factory=RefinerConfig)
    sam: SamMed3DConfig = dataclasses.field(default_factory=SamMed3DConfig)
    init: str | None = None

    steps: int = 10_000
    epochs: int = 0
    minutes: float | None = None
    batch: int = 8
    accumulate: int = 1
    workers: int = 0
    sampling: Literal["balanced", "epochs"] = "balanced"
    modality_weights: tuple[tuple[str, float], ...] = (
        ("CT", 0.27),
        ("MR", 0.33),
        ("Microscopy", 0.24),
        ("PET", 0.10),
        ("US", 0.06),
    )
    hard: float = 0.0

    windows: tuple[tuple[float, int], ...] = ((0.0, 48),)
    box_scale: tuple[float, float] = (1.5, 2.2)
    no_box: float = 0.28
    others: float = 0.6
    sloppy_box: float = 0.0
    zoom: float = 0.35
    synthetic: float = 0.18
    supervoxels: float = 0.0
    shapes: float = 0.0
    joined: float = 0.0
    flip: float = 0.5
    permute: float = 0.25
    upright: float = 0.0
    warp: float = 0.4
    gamma: float = 0.5
    inversion: float = 0.12
    low_resolution: float = 0.15
    blur: float = 0.15
    shading: float = 0.2
    noise: float = 0.25

    rounds: int = 6
    pointless_rounds: int = 0
    clicks: Literal["deep", "random"] = "deep"
    click_slack: float = 0.3
    no_click: float = 0.12
    poor_mask: float = 0.0
    tell_apart: float = 0.0
    no_mask: float = 0.0
    previous_mask: Literal["binary", "logits"] = "binary"

    dice: float = 1.0
    cross_entropy: float = 1.0
    focal: float = 0.0
    focal_gamma: float = 2.0
    boundary: float = 0.0
    iou: float = 0.0

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1.5e-3
    lr_prompts: float | None = None
    schedule: Literal["cosine", "multistep"] = "cosine"
    lr_end: float = 0.01
    lr_gamma: float = 0.1
    milestones: tuple[float, ...] = ()
    warmup_steps: int = 100
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    decay_all: bool = False
    clip_norm: float = 1.0
    ema: float = 0.998
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    most_skipped: int = 20

    log_steps: int = 50
    checkpoint_minutes: float = 5.0
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no run can be made from.

        Raises:
            ValueError: a value is out of range.
        """
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 0..1")
        if self.synthetic + self.supervoxels + self.shapes > 1:
            raise ValueError("synthetic, supervoxels and shapes add up to more than 1")
        for least, names in _LEAST:
            for name in names:
                value = getattr(self, name)
                if not least <= value < math.inf:
                    raise ValueError(f"{name} is {value}; accepted: at least {least}")
        for name in ("lr", "lr_prompts"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; accepted: above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; accepted: from 0 to below 1")
        if not 0 < self.box_scale[0] <= self.box_scale[1] < math.inf:
            raise ValueError(f"box_scale is {self.box_scale}; accepted: least and most, above 0")
        if not all(0 <= weight < math.inf for _, weight in self.modality_weights):
            raise ValueError(f"modality_weights is {self.modality_weights}; accepted: 0 and more")
        if not self.dice + self.cross_entropy + self.focal + self.boundary > 0:
            raise ValueError("dice, cross_entropy, focal and boundary are 0; accepted: one above 0")
        if not self.epochs and self.steps < 1:
            raise ValueError(
                f"epochs is {self.epochs}, steps {self.steps}; accepted: at least 1 of either"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; accepted: null, or above 0")
        starts = [start for start, _ in self.windows]
        if starts[:1] != [0] or starts != sorted(set(starts)) or starts[-1] >= 1:
            raise ValueError(
                f"windows is {self.windows}; accepted: pairs, the first at 0.0, the others "
                "ascending from there to below 1"
            )
        stride = self.refiner.stride
        if self.network == "refiner" and any(n < 1 or n % stride for _, n in self.windows):
            raise ValueError(f"windows is {self.windows}; accepted: multiples of {stride}")
        if self.optimizer == "muon" and self.network != "refiner":
            raise ValueError(f"optimizer is muon, network {self.network}; accepted: refiner")
        needed = self.batch // self.worker_places
        if self.workers and (self.network != "refiner" or self.workers < needed):
            raise ValueError(
                f"workers is {self.workers}, network {self.network}, batch {self.batch}; accepted: "
                f"0, or for the refiner {needed} and more"
            )
        if self.pointless_rounds > max(0, self.rounds - 2):
            raise ValueError(
                f"pointless_rounds is {self.pointless_rounds} of {self.rounds} rounds; accepted: "
                "all but two at most"
            )

    @property
    def worker_places(self) -> int:
        """Objects of a worker, so that those of a few workers make a batch."""
        return math.gcd(self.batch, _WORKER_PLACES)

    @classmethod
    def load(cls, path: Path | None, overrides: Sequence[str] = ()) -> Config:
        """Read YAML (or the defaults) and apply ``key=value`` overrides (values in YAML).

        A key of the network's shape has a dot: ``sam.embed_dim=384``.

        Raises:
            ValueError: for an unknown key, a pair without '=', what is not YAML, or a value of
                another type or out of range.
        """
        values: dict[str, Any] = {}
        if path is not None:
            read = _yaml(path.read_text(encoding="utf-8"), str(path))
            if not isinstance(read, dict | None):
                raise ValueError(f"{path}: received {type(read).__name__}; accepted: keys, values")
            values.update(read or {})
        for pair in overrides:
            key, equals, text = pair.partition("=")
            if not equals:
                raise ValueError(f"--set received {pair!r}; accepted: key=value")
            value = _yaml(text, f"--set {pair}")
            part, dot, field = key.partition(".")
            if dot:
                before = values.get(part, {})
                if not isinstance(before, dict):
                    raise ValueError(f"{part} is {before!r}; accepted: keys and values")
                values[part] = {**before, field: value}
            else:
                values[key] = value
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from plain values; lists become tuples.

        Raises:
            ValueError: for an unknown key, or a value of another type or out of range.
        """
        config: Config = _build(cls, values, "configuration")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML can write and :meth:`from_dict` reads."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


#: The least that others may be.
_LEAST = (
    (1, ("batch", "accumulate", "rounds", "log_steps", "most_skipped")),
    (0, ("epochs", "workers", "pointless_rounds", "warmup_steps", "hard", "checkpoint_minutes")),
    (0, ("dice", "cross_entropy", "focal", "focal_gamma", "boundary", "iou")),
    (0, ("lr_end", "lr_gamma", "weight_decay", "clip_norm", "seed")),
)
_PROBABILITIES = (
    *("no_box", "others", "sloppy_box", "zoom", "synthetic", "supervoxels", "shapes"),
    "joined",
    *("flip", "permute", "upright", "warp", "gamma", "inversion", "low_resolution", "blur"),
    *("shading", "noise", "click_slack", "no_click", "poor_mask", "tell_apart"),
    *("no_mask", "ema"),
)


def _build(kind: type[Any], values: Mapping[str, Any], what: str) -> Any:
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(map(str, set(values) - set(names)))
    if unknown:
        raise ValueError(f"{what} received {unknown}; accepted: {names}")
    ready = {key: _frozen(value) for key, value in values.items()}
    if kind is Config:
        for name, part in (("refiner", RefinerConfig), ("sam", SamMed3DConfig)):
            if isinstance(ready.get(name), Mapping):
                ready[name] = _build(part, ready[name], name)
    hints = get_type_hints(kind)
    for name, value in ready.items():
        if not _is_a(value, hints[name]):
            meant = isinstance(value, str) and _is_a(0.0, hints[name])
            more = " (YAML takes 1.0e-3, not 1e-3)" if meant else ""
            raise ValueError(f"{name} is {_plain(value)!r}; accepted: {_words(hints[name])}{more}")
    return kind(**ready)


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type; whole numbers are numbers, too."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is UnionType:
        return any(_is_a(value, part) for part in parts)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(wanted) and all(map(_is_a, value, wanted))
    return type(value) is hint or (hint is float and type(value) is int)


def _words(hint: Any) -> str:
    """An annotated type as YAML would be written."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {parts}"
    if get_origin(hint) is UnionType:
        return " or ".join(map(_words, parts))
    if get_origin(hint) is tuple:
        return f"[{', '.join('...' if part is Ellipsis else _words(part) for part in parts)}]"
    plain = {float: "a number", NoneType: "null", str: "text"}
    return plain.get(hint, hint.__name__ if hint in (int, bool) else "keys and values")


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}; accepted: YAML") from None


def _frozen(value: object) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
