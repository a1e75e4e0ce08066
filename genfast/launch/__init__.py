"""Launchers: torch tensors in, native and Triton kernels below. One module an op; the ops call nothing else."""
