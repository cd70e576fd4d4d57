"""Denoisers: networks called ``(x_t, t, condition) -> prediction``. One file each, named as the denoiser."""
