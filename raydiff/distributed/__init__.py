"""The only package that imports Ray. Nothing here computes: it spreads plain functions over machines."""
