"""Products and sums that write to `out`, and an einsum under inference mode. Reports the nonzeros of its spikes."""

import json

import torch

torch.manual_seed(0)
spikes = (torch.rand(4, 5) < 0.3).float()
weights, result = torch.randn(5, 6), torch.empty(4, 6)
torch.mm(spikes, weights, out=result)
torch.addmm(result, spikes, weights, out=result)
torch.add(spikes, spikes, out=torch.empty(4, 5))
torch.sub(weights, 2 * weights, out=torch.empty(5, 6))
with torch.inference_mode():
    inputs, matrix = (torch.rand(3, 4) < 0.5).float(), torch.randn(4, 2)
    torch.einsum("ij,jk->ik", inputs, matrix)
    torch.einsum("ij,jk->ik", matrix.t(), inputs.t())
print(json.dumps({"spikes": int(spikes.sum()), "inputs": int(inputs.sum())}))
