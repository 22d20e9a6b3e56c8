import pytest
import torch

from gatera_lightning import adapter_parameters


@pytest.fixture(scope="session")
def randomize():
    """Return a function that perturbs every adapter parameter, so that B, gates and magnitudes matter."""

    def perturb(module, seed=3, size=0.5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(module).values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((size * noise).to(parameter.dtype))
        return module

    return perturb
