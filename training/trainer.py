"""The training loop: rollouts of the interaction, one forward and backward pass a round."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inference.model.refiner import Refiner
from inference.precision import autocast
from inference.prompts import refiner_channels
from training.click_simulation import next_click
from training.config import Config
from training.dataset import Episode, EpisodeSampler
from training.losses import dice_ce


class Trainer:
    """Trains a refiner on the episodes of a sampler.

    A pool of ``batch`` objects is kept: every step is one round of each; the next click comes from
    the step's own output, and an object leaves after its last round or once it is perfect.
    """

    def __init__(self, model: Refiner, sampler: EpisodeSampler, config: Config, out: Path) -> None:
        """Prepare optimiser, average and pool; nothing runs yet."""
        self.model, self.config = model, config
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self._sampler, self._out = sampler, out
        self._device = next(model.parameters()).device
        self._rng = np.random.default_rng(config.seed + 1)
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        self._optimiser = torch.optim.AdamW(
            [{"params": decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.step, self.minutes, self.windows = 0, 0.0, 0
        self._pool: list[Episode] = []
        self._scores: dict[str, list[float]] = defaultdict(list)

    @property
    def progress(self) -> float:
        """Share of the run that is over, 0..1."""
        return min(1.0, max(self.step / self.config.steps, self.minutes / self.config.minutes))

    def run(self, checkpoint_minutes: float = 5.0, log_minutes: float = 1.0) -> None:
        """Train to the end of the schedule; write ``checkpoint.pt`` and a log line now and then."""
        begun, before = time.monotonic(), self.minutes
        saved = logged = self.minutes
        while self.progress < 1:
            self._step()
            self.minutes = before + (time.monotonic() - begun) / 60
            if self.minutes - logged >= log_minutes:
                logged = self.minutes
                self._log()
            if self.minutes - saved >= checkpoint_minutes:
                saved = self.minutes
                self.save()
        self._log()
        self.save()

    def _step(self) -> None:
        config = self.config
        edge = [size for start, size in config.windows if start <= self.progress][-1]
        self._pool = [e for e in self._pool if e.rounds > 0 and e.image.shape[0] == edge]
        while len(self._pool) < config.batch:
            self._pool.append(self._sampler.draw(edge))
        image = torch.stack([e.image for e in self._pool])
        target = torch.stack([e.target for e in self._pool])
        masks = [e.mask if e.mask is not None else torch.zeros_like(e.image) for e in self._pool]
        known = [bool(mask.any()) for mask in masks]
        channels = refiner_channels(
            image, [e.prompts for e in self._pool], torch.stack(masks), known
        )
        cuda = self._device.type == "cuda"
        self.model.train()
        with autocast(self._device):
            logits = self.model(channels)
        losses = dice_ce(logits, target[:, None])
        rate = self._rate()
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad(set_to_none=True)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self._optimiser.step()
        self.step += 1
        self.windows += len(self._pool)
        with torch.no_grad():
            decay = min(config.ema, (1 + self.step) / (10 + self.step))
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
            predicted = logits[:, 0] > 0
            if cuda:
                torch.cuda.synchronize()
            for episode, mask in zip(self._pool, predicted, strict=True):
                self._advance(episode, mask)

    def _advance(self, episode: Episode, mask: Tensor) -> None:
        """Score a round and add what the user says next."""
        target = episode.target.bool()
        both = int((mask & target).sum())
        dice = 2 * both / max(1, int(mask.sum()) + int(target.sum()))
        kind = "box" if episode.prompts.box else "click"
        modality = episode.source.split("_")[0]
        self._scores[f"{modality} {kind} {min(episode.round, 5)}"].append(dice)
        episode.rounds -= 1
        episode.round += 1
        episode.mask = mask.float()
        if self._rng.random() < self.config.no_click:
            return
        click = next_click(mask.cpu().numpy(), target.cpu().numpy(), episode.cell, self._rng)
        if click is None:
            episode.rounds = 0
        else:
            episode.prompts = dataclasses.replace(
                episode.prompts, clicks=(*episode.prompts.clicks, click)
            )

    def _rate(self) -> float:
        """Linear warm-up, then a cosine to ``lr_end``."""
        config = self.config
        warm = min(1.0, (self.step + 1) / config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return config.lr * warm * (config.lr_end + (1 - config.lr_end) * cosine)

    def _log(self) -> None:
        """Print step, time, windows and the running Dice by modality, prompt and round."""
        parts = [
            f"{key} {np.mean(values):.3f}" for key, values in sorted(self._scores.items()) if values
        ]
        print(
            f"step {self.step} minutes {self.minutes:.1f} windows {self.windows} "
            f"lr {self._rate():.2e} | " + " | ".join(parts),
            flush=True,
        )
        self._scores.clear()

    def save(self) -> None:
        """Write ``checkpoint.pt`` atomically."""
        path = self._out / "checkpoint.pt"
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self._optimiser.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
            "windows": self.windows,
            "config": dataclasses.asdict(self.config),
            "refiner": dataclasses.asdict(self.model.config),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of :meth:`save`."""
        state = torch.load(path, weights_only=True, map_location=self._device)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self._optimiser.load_state_dict(state["optimiser"])
        self.step, self.minutes = state["step"], state["minutes"]
        self.windows = state["windows"]
        # Other draws than before the interruption.
        self._rng = np.random.default_rng((self.config.seed + 1, self.step))
