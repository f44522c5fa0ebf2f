from __future__ import annotations

import torch

from ldm.config import from_dict
from ldm.denoiser import MLPConfig
from ldm.denoiser.mlp import StepEmbedding
from ldm.nn.conditioning import Conditioning


def test_the_step_is_read_between_its_rows() -> None:
    embedding = StepEmbedding(10, 4)
    table = embedding.table.weight
    rows = embedding(torch.tensor([0.0, 3.0, 3.25, 9.0, 12.0]))
    expected = torch.stack([table[0], table[3], 0.75 * table[3] + 0.25 * table[4], table[9], table[9]])
    torch.testing.assert_close(rows, expected)


def test_it_equals_the_tutorials_loop() -> None:
    """Linear, plus the embedding of the step, ReLU; a last linear layer. Written out for one hidden layer."""
    network = from_dict(
        MLPConfig, {"in_channels": 3, "out_channels": 3, "width": 8, "layers": 1, "num_timesteps": 5}
    ).build()
    x, t = torch.randn(6, 3, 1, 1), torch.randint(0, 5, (6,)).float()
    first, step = network.layers[0], network.steps[0].table.weight[t.long()]
    hidden = (x[:, :, 0, 0] @ first.weight.T + first.bias + step).clamp(min=0)
    expected = hidden @ network.out.weight.T + network.out.bias
    torch.testing.assert_close(network(x, t, Conditioning())[:, :, 0, 0], expected)
