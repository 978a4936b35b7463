"""One frozen training configuration, read from YAML, overridable by key=value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. Lengths are shares of the run's progress, 0 at the start and 1 at the end.

    Attributes:
        steps: optimiser steps; the run ends at ``steps`` or ``minutes``, whichever comes first.
        minutes: wall-clock minutes, counted over resumed runs; the schedule follows whichever of
            both is further on.
        batch: windows a step.
        windows: (progress, edge in cells) pairs: the window's edge from that progress on. A small
            window first costs less than half and teaches the coarse part.
        lr, weight_decay, betas, warmup_steps, clip_norm: AdamW with a cosine to ``lr_end * lr``.
        ema: decay of the exponential moving average that is exported.
        max_rounds: an object is kept for 1 to this many rounds.
        no_box, no_click, zoom, synthetic, permute, warp: probabilities: box absent; a round
            without a new click; a zoomed window of a large object; an image painted on a label
            map; permuted axes; a rotated, sheared and elastically deformed window.
        box_scale: range of the window's edge in boxes.
        modality_weights: share of the windows each modality gets.
        seed: of everything random.
    """

    steps: int = 100_000
    minutes: float = 90.0
    batch: int = 8
    windows: tuple[tuple[float, int], ...] = ((0.0, 48), (0.36, 64))
    lr: float = 1.5e-3
    lr_end: float = 0.01
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 200
    clip_norm: float = 1.0
    ema: float = 0.998
    max_rounds: int = 6
    no_box: float = 0.3
    no_click: float = 0.12
    zoom: float = 0.35
    synthetic: float = 0.12
    permute: float = 0.25
    warp: float = 0.4
    box_scale: tuple[float, float] = (1.5, 2.2)
    modality_weights: tuple[tuple[str, float], ...] = (
        ("CT", 0.25),
        ("MR", 0.28),
        ("Microscopy", 0.22),
        ("PET", 0.15),
        ("US", 0.10),
    )
    seed: int = 0

    @classmethod
    def load(cls, path: Path | None, overrides: Sequence[str] = ()) -> Config:
        """Read YAML (or the defaults) and apply ``key=value`` overrides (values in YAML).

        Raises:
            ValueError: for an unknown key or a pair without '='.
        """
        values: dict[str, object] = {}
        if path is not None:
            values.update(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        for pair in overrides:
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"--set received {pair!r}; accepted: key=value")
            values[key] = yaml.safe_load(value)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Config:
        """Build from plain values; lists become tuples. Unknown keys raise ValueError."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"configuration received {unknown}; accepted: {names}")
        return cls(**{k: _frozen(v) for k, v in values.items()})  # type: ignore[arg-type]


def _frozen(value: object) -> object:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
