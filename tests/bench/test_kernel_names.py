"""What SDPA took is told from the names of the kernels that an H100's profile showed."""

import pytest

from bench.lib.kernel_names import kind_of

NAMES = {
    "cudnn": ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0"],
    "flash": ["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false>>", "memset"],
    "efficient": ["fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)"],
    "math": ["ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_nn", "void at::native::softmax_warp_forward"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_kernel_of_sdpa_is_told_by_its_name(kind):
    assert kind_of(["void at::native::elementwise_kernel", *NAMES[kind]]) == kind


def test_without_any_kernel_it_is_pytorchs_own_definition():
    assert kind_of([]) == "math"
