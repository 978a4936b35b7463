"""The optimisers with their parameter groups and learning rates, and the average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from training.config import Config
from training.muon import Muon

#: First and last layer of the refiner: for Muon only what lies between them is a matrix.
_ENDS = ("stem.", "head.")


class Optimisation:
    """The configuration's optimisers, schedule and exponential moving average.

    With ``optimizer`` "muon" the refiner's convolutions but the first and the last are trained by
    Muon (Jordan et al. 2024), each as a matrix of its first axis by all others: the momentum made
    orthogonal, and scaled so that a learning rate means what it means to AdamW (Liu et al.
    2025). AdamW trains all the rest.

    Args:
        model: whose parameters are trained; SAM-Med3D's image encoder has a rate of its own.
        config: of the run.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        """Sort the parameters; the average starts at the model."""
        self._model, self._config = model, config
        self._matrices: list[tuple[nn.Parameter, Tensor]] = []
        groups, self._rates, self._decays = [], [], []
        for encoder in (True, False):
            for decayed in (True, False):
                found = [
                    p
                    for name, p in model.named_parameters()
                    if _is_encoder(name, config) == encoder
                    and (config.decay_all or p.ndim > 1) == decayed
                    and not _is_matrix(name, p, config)
                ]
                if found:
                    groups.append({"params": found})
                    prompts = config.lr if config.lr_prompts is None else config.lr_prompts
                    self._rates.append(config.lr if encoder else prompts)
                    self._decays.append(config.weight_decay if decayed else 0.0)
        self.optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr)]
        if config.optimizer == "muon":
            # The optimiser takes nothing but matrices: views of the weights.
            self._matrices = [
                (p, p.detach().flatten(1))
                for name, p in model.named_parameters()
                if _is_matrix(name, p, config)
            ]
            views = [view for _, view in self._matrices]
            self.optimisers.append(Muon(views, config.lr))
            self._rates.append(config.lr)
            self._decays.append(config.weight_decay)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all optimisers, in the order of their rates."""
        return [group for one in self.optimisers for group in one.param_groups]

    def prepare(self, step: int, progress: float, epoch: float) -> float:
        """Forget the last step's gradients, and set the rates of a step.

        Args:
            step: steps so far.
            progress: share of the run so far, 0..1.
            epoch: epochs so far.

        Returns:
            The first group's rate.
        """
        self._model.zero_grad(set_to_none=True)
        factor = rate_factor(self._config, step, progress, epoch)
        for group, rate, decay in zip(self._groups, self._rates, self._decays, strict=True):
            group.update(lr=rate * factor, weight_decay=decay)
            if "betas" in group:
                group["betas"] = self._config.betas
        return float(self._groups[0]["lr"])

    def unscale(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Take the loss's scale out of the gradients and clip them to the configured norm.

        Returns:
            The norm of all gradients before that; not finite if one of them is not.
        """
        for parameter, view in self._matrices:
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for one in self.optimisers:
            scaler.unscale_(one)
        limit = self._config.clip_norm or math.inf
        trained = [p for group in self._groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(trained, limit)

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Change the weights by the gradients."""
        for one in self.optimisers:
            scaler.step(one)

    def update_average(self, step: int) -> None:
        """Follow the model, faster in the first steps; without an average, be the model."""
        decay = min(self._config.ema, (1 + step) / (10 + step))
        for name, value in self._model.state_dict().items():
            self.average[name].lerp_(value.to(self.average[name].dtype), 1 - decay)

    def state(self) -> list[dict[str, Any]]:
        """What the optimisers remember, one a dictionary."""
        return [one.state_dict() for one in self.optimisers]

    def load(self, states: list[dict[str, Any]]) -> None:
        """Go on from :meth:`state`.

        Raises:
            ValueError: it is that of other optimisers.
        """
        if len(states) != len(self.optimisers):
            raise ValueError(
                f"the checkpoint has the state of {len(states)} optimisers; accepted: of "
                f"{len(self.optimisers)}, as optimizer is {self._config.optimizer}"
            )
        for one, state in zip(self.optimisers, states, strict=True):
            one.load_state_dict(state)


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


def _is_matrix(name: str, parameter: Tensor, config: Config) -> bool:
    """Whether Muon trains a parameter."""
    return config.optimizer == "muon" and parameter.ndim > 1 and not name.startswith(_ENDS)
