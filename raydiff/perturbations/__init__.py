"""Perturbations: changed images for the robustness table, synthetic anomalies for model selection. One file each."""
