"""The optimiser's parameter groups, its learning rate, and the average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from training.config import Config


class Optimisation:
    """AdamW with the configuration's groups, schedule and exponential moving average.

    Args:
        model: whose parameters are trained; SAM-Med3D's image encoder has a rate of its own.
        config: of the run.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        """Sort the parameters; the average starts at the model."""
        self._model, self._config = model, config
        groups, self._rates, self._decays = [], [], []
        for encoder in (True, False):
            for decayed in (True, False):
                found = [
                    p
                    for name, p in model.named_parameters()
                    if _is_encoder(name, config) == encoder
                    and (config.decay_all or p.ndim > 1) == decayed
                ]
                if found:
                    groups.append({"params": found})
                    prompts = config.lr if config.lr_prompts is None else config.lr_prompts
                    self._rates.append(config.lr if encoder else prompts)
                    self._decays.append(config.weight_decay if decayed else 0.0)
        self.optimiser = torch.optim.AdamW(groups, lr=config.lr)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def prepare(self, step: int, progress: float, epoch: float) -> float:
        """Set the rates of a step.

        Args:
            step: steps so far.
            progress: share of the run so far, 0..1.
            epoch: epochs so far.

        Returns:
            The first group's rate.
        """
        factor = rate_factor(self._config, step, progress, epoch)
        groups = self.optimiser.param_groups
        for group, rate, decay in zip(groups, self._rates, self._decays, strict=True):
            group.update(lr=rate * factor, weight_decay=decay, betas=self._config.betas)
        return float(groups[0]["lr"])

    def update_average(self, step: int) -> None:
        """Follow the model, faster in the first steps; without an average, be the model."""
        decay = min(self._config.ema, (1 + step) / (10 + step))
        for name, value in self._model.state_dict().items():
            self.average[name].lerp_(value.to(self.average[name].dtype), 1 - decay)

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients, before they are clipped to the configured norm."""
        limit = self._config.clip_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit)


def rate_factor(config: Config, step: int, progress: float, epoch: float) -> float:
    """What the learning rates are multiplied with: linear warm-up, then the schedule."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "multistep":
        # A step's epoch is a ratio of whole numbers: allow for its rounding.
        return warm * config.lr_gamma ** sum(epoch + 1e-9 >= m for m in config.milestones)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return warm * (config.lr_end + (1 - config.lr_end) * cosine)


def _is_encoder(name: str, config: Config) -> bool:
    """Whether a parameter has the rate ``lr``: all but SAM-Med3D's prompts and masks do."""
    return config.network == "refiner" or name.startswith("image_encoder.")
