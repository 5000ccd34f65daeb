"""The CUDA backend: NVIDIA GPUs through torch, with operators in Triton."""

import logging

import torch

from backends.base import DrawTokens, HardwareBackend, LogitKernels
from backends.cuda.operator_kernels import (
    register_kernels,
    triton_is_installed,
    unknown_to_kernels,
    why_no_kernels,
)
from backends.device_info import BackendCapabilities, KVLayout
from backends.errors import BackendUnavailableError
from backends.operators.registry import KernelRegistry
from backends.torch_device.accelerator_backend import AcceleratorBackend, TorchAccelerator

_LOG = logging.getLogger(__name__)
_CUDA = TorchAccelerator(
    backend_name="cuda",
    device_type="cuda",
    module_name="torch.cuda",
    graph_class="CUDAGraph",
    visible_devices_variable="CUDA_VISIBLE_DEVICES",
)


def create_backend() -> HardwareBackend:
    """Raises BackendUnavailableError where torch was built without CUDA or sees no device."""
    if torch.version.cuda is None:
        built = "without it" if torch.version.hip is None else f"for ROCm {torch.version.hip}"
        raise BackendUnavailableError(
            f"backend 'cuda' needs torch built for CUDA; torch {torch.__version__} is built {built}"
        )
    if torch.cuda.device_count() == 0:
        raise BackendUnavailableError(
            f"backend 'cuda' sees no device: torch {torch.__version__} is built for CUDA {torch.version.cuda}, but the "
            "driver is missing or CUDA_VISIBLE_DEVICES hides all devices"
        )
    return CudaBackend(_CUDA)


class CudaBackend(AcceleratorBackend):
    """NVIDIA GPUs."""

    def runtime_version(self) -> str:
        return f"CUDA {torch.version.cuda}"

    def capabilities(self, device_index: int | None = None) -> BackendCapabilities:
        index = self.checked_index(device_index)
        capability = torch.cuda.get_device_capability(index)
        has_bfloat16, has_fp8 = capability >= (8, 0), capability >= (8, 9)
        # Triton compiles for devices of compute capability 8.0 and later.
        has_triton = has_bfloat16 and triton_is_installed()
        peers = [peer for peer in range(self.get_device_count()) if self.can_access_peer(index, peer)]
        return BackendCapabilities(
            dtypes=("bfloat16", "float16", "float32") if has_bfloat16 else ("float16", "float32"),
            storage_dtypes=("int8", "float8_e4m3fn"),
            graph_capture=True,
            grid_kernels=has_triton,
            concurrent_streams=True,
            pinned_memory=True,
            peer_copy=bool(peers),
            fp8_matmul=has_fp8,
            paged_attention=has_triton,
            kv_layout=KVLayout.BLOCK_TOKEN_HEAD,
            kv_block_sizes=(16, 32, 64, 128),
            collectives="nccl",
            visible_devices_variable=_CUDA.visible_devices_variable,
        )

    def token_drawing(self) -> DrawTokens | None:
        if why_no_kernels(self.current_device()):
            return None
        from backends.cuda.kernels.sampling import draw_tokens

        return draw_tokens

    def logit_kernels(self) -> LogitKernels | None:
        if why_no_kernels(self.current_device()):
            return None
        from backends.cuda.kernels.logit_kernels import TritonLogitKernels

        return TritonLogitKernels()

    def unknown_to_kernels(self, head_dim: int, num_heads_each: int) -> tuple[str, ...]:
        return unknown_to_kernels(head_dim, num_heads_each)

    def register_operators(self, registry: KernelRegistry) -> None:
        index = self.current_device()
        if reason := why_no_kernels(index):
            slower = "torch's operators, which are slower, run instead of kernels, and decode steps are not captured"
            _LOG.warning("%s:%d: %s: %s", self.name, index, slower, reason)
            return
        register_kernels(registry, self.name)
