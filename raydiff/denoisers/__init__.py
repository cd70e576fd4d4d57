"""Denoisers: networks called ``(x_t, t, condition) -> prediction``. One file each; the file's name is the denoiser's."""
