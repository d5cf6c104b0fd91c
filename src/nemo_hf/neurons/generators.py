"""The mask generator: a small network that decides, for each sample, which neurons of a site are open."""

import torch
from torch import Tensor, nn

MASK_BIAS = 1.0  # at the start: tanh(1) = .76, so that every neuron is open and can still close


class MaskGenerator(nn.Module):
    """Low-rank network from a site's pooled input to its soft masks: relu(tanh(W2 relu(W1 p + b1) + b2)).

    NeMo (arXiv 2508.11348) makes the hidden width that of the layer; here it is `rank`.
    """

    def __init__(self, in_features: int, rank: int, neurons: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank)
        self.up = nn.Linear(rank, neurons)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights; all neurons start open for inputs of ordinary size."""
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.normal_(self.up.weight, std=0.02)
        nn.init.constant_(self.up.bias, MASK_BIAS)

    def forward(self, pooled: Tensor) -> Tensor:
        """Maps pooled inputs (batch, in_features) to soft masks (batch, neurons) in [0, 1), float32."""
        # Without autocast: a mask near 0 must not open or close with the dtype.
        with torch.autocast(pooled.device.type, enabled=False):
            hidden = nn.functional.linear(pooled.float(), self.down.weight.float(), self.down.bias.float()).relu()
            return nn.functional.linear(hidden, self.up.weight.float(), self.up.bias.float()).tanh().relu()
