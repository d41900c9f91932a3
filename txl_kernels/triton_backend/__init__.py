"""The Triton backend: fused kernels for CUDA and HIP devices, or for CPU tensors in Triton's interpreter."""

from triton.runtime.interpreter import InterpretedFunction

from txl_kernels.triton_backend.forward_kernel import forward_kernel
from txl_kernels.triton_backend.launch_backward import backward
from txl_kernels.triton_backend.launch_forward import forward

INTERPRETED = isinstance(forward_kernel, InterpretedFunction)

__all__ = ["INTERPRETED", "backward", "forward"]
