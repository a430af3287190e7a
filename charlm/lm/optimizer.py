"""The optimizer of a run and its learning rate at each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from charlm.lm.config import Config

STEP_DECAY = 0.1  # factor of the learning rate after half of the steps with schedule "step", as in makemore's lecture


def learning_rate_at(config: Config, step: int) -> float:
    """The learning rate of step `step`, 0 ≤ step < max_steps."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = step / config.max_steps
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done))
    elif config.schedule == "step":
        factor = 1.0 if done < 0.5 else STEP_DECAY
    else:
        factor = 1.0
    return config.learning_rate * warmup * factor


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Builds the optimizer of `config`; only the weights of linear layers have weight decay."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
