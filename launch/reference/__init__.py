"""The comparison with the PyTorch reference: its own code and ours on the same inputs."""
