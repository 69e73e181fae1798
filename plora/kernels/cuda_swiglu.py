"""The fused SwiGLU passes on the CUDA kernels."""
