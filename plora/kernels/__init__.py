"""The packed LoRA products: the reference in plain torch, the CUDA kernels, and the choice between them."""

from plora.kernels.dispatch import Backend, backend

__all__ = ["Backend", "backend"]
