"""Models whose weights all count, for comparisons with code that we did not write."""

import torch


def shaken(model, seed=0):
    """Random weights of which none has a special value such as 0, so that each one counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p[0].numel() ** -0.5 if p.ndim in (2, 4) else 0.3
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()
