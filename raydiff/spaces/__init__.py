"""Spaces: what is being diffused, and the way from images to it and back. One file each."""
