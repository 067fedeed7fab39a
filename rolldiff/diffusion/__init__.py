"""The mathematics of grouped diffusion: pure tensors, no network and no `nn.Module`."""
