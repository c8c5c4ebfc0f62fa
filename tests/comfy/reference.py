"""What the tests compare with: the method without ComfyUI, and a MODEL that is an ensemble without our routing."""

import torch


def core_denoise(pack, folder, positive, negative, cfg):
    """The core's guided ensemble as denoise(x, sigma), on the conditionings of ComfyUI."""
    ensemble = pack.core("checkpoint").load_ensemble(folder)
    config = ensemble.experts[0].network.config
    cond, uncond = (core_conditioning(pack, conditioning, config) for conditioning in (positive, negative))
    guided = pack.core("guidance").guided(ensemble, cfg, null=None)

    def denoise(x, sigma):
        assert not uncond.clip_mask.any(), "The core's guidance moves away from the null conditioning."
        rows = pack.core("conditioning").joined([cond] * len(x))
        with torch.no_grad():
            return guided(x, sigma, rows)

    return denoise


def core_conditioning(pack, conditioning, config):
    tokens, values = conditioning[0]
    image = torch.zeros(1, config.image_width)
    return pack.bridge.unpacked(tokens, values["pooled_output"], image, torch.zeros(1, dtype=torch.bool), config)


class Dispatch(torch.nn.Module):
    """Several networks as one: each call goes to the network that owns its noise level, with no switch of models."""

    def __init__(self, networks, edges):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)
        self.edges = edges  # lower edges in sigma, from high to low noise
        self.config = networks[0].config
        self.dtype = networks[0].dtype
        self.calls = []

    def forward(self, x, timesteps, *args, **kwargs):
        sigma = float((4 * timesteps[0].double()).exp())
        owner = next(i for i, edge in enumerate(self.edges) if sigma >= edge)
        self.calls.append(owner)
        return self.networks[owner](x, timesteps, *args, **kwargs)


def oracle(pack, folder):
    """A MODEL whose network is all experts of an ensemble behind a plain `if`."""
    description = pack.core("checkpoint").read_ensemble(folder)
    patchers = [pack.bridge.load_expert(path) for path in description.paths]
    networks = [patcher.model.diffusion_model for patcher in patchers]
    patchers[0].model.diffusion_model = Dispatch(networks, [interval.low for interval in description.intervals])
    return patchers[0]
