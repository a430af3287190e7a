"""A biased coin: entropy, cross-entropy and KL divergence, and the gradient of the loss that training minimizes.

P = (p, 1 - p) is the coin, and Q = softmax(z) what a model believes. The gradient of H(P, Q) with respect to the logits
z is Q - P: it is 0 where the model is right, and there H(P, Q) = H(P).
"""

from __future__ import annotations

import math

import torch

import charlm.functional as F
from charlm._errors import UserError

STEP = 1.0  # size of a step of gradient descent, in nats


def coin(p: float, q: float) -> dict[str, float]:
    """The information of a coin, and one step of gradient descent on z, for probabilities p and q of heads.

    Returns:
        In bits, "entropy" H(P), "cross_entropy" H(P, Q) and "kl" KL(P || Q); "gradient" dH(P, Q)/dz of heads, in nats;
        "next", q after the step z - STEP · gradient.

    Raises:
        UserError: p is outside [0, 1], or q is outside (0, 1), where the cross-entropy may be infinite.
    """
    if not (0 <= p <= 1 and 0 < q < 1):
        raise UserError(f"p is {p} and q is {q}, but p must be in [0, 1] and q above 0 and below 1")
    P = torch.tensor([p, 1 - p], dtype=torch.float64)
    z = torch.tensor([q, 1 - q], dtype=torch.float64).log().requires_grad_()
    loss = F.cross_entropy(z, P)
    (gradient,) = torch.autograd.grad(loss, z)
    after = (z.detach() - STEP * gradient).softmax(0)
    bits = {"entropy": F.entropy(P.log()), "cross_entropy": loss, "kl": F.kl_divergence(P, z, p_kind="probs")}
    found = {name: value.item() / math.log(2) for name, value in bits.items()}
    return {**found, "gradient": gradient[0].item(), "next": after[0].item()}
