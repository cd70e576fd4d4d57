"""Scorers: from images and a diffusion model to anomaly scores and maps. One file each."""
