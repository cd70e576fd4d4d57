"""Baselines: classic detectors behind the same contract as the diffusion detector. One file each."""
