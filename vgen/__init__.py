"""Video diffusion that is causal in time."""
