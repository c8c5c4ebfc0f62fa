"""eDiff-I in pure PyTorch: the method, without a host program. `pipeline` is where reading starts."""
