import pytest
import torch

from ddpm.errors import UserError
from ddpm.runtime.device import can_compile, enough_memory, select_device

HAS_CUDA, HAS_MPS = torch.cuda.is_available(), torch.backends.mps.is_available()


def test_the_cpu_can_be_had_everywhere():
    assert select_device("cpu") == torch.device("cpu")


def test_auto_takes_what_there_is():
    expected = "cuda" if HAS_CUDA else "mps" if HAS_MPS else "cpu"
    assert select_device("auto").type == expected
    assert torch.ones(2, device=select_device("auto")).sum().item() == 2


@pytest.mark.skipif(HAS_CUDA, reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(name):
    with pytest.raises(UserError) as caught:
        select_device(name)
    assert str(caught.value) == f"runtime.device: '{name}', but PyTorch sees no CUDA device here; use auto or cpu"


def test_several_processes_share_no_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"^runtime.device: 'cuda:0', but several processes can't share it; use cuda, or one"):
        select_device("cuda:0")


def test_without_a_compiler_nothing_is_compiled(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not can_compile(torch.device("cuda"))
    assert not can_compile(torch.device("cpu"))


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA")
def test_cuda_devices_beyond_the_last():
    count = torch.cuda.device_count()
    assert select_device(f"cuda:{count - 1}") == torch.device("cuda", count - 1)
    with pytest.raises(UserError) as caught:
        select_device(f"cuda:{count}")
    assert str(caught.value) == f"runtime.device: 'cuda:{count}', but this machine has {count} CUDA devices, from cuda:0"


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA")
@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_as_asked(tf32):
    select_device("cuda", tf32)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32


@pytest.mark.skipif(HAS_MPS, reason="this machine has an Apple GPU")
def test_mps_where_there_is_none():
    with pytest.raises(UserError) as caught:
        select_device("mps")
    assert str(caught.value) == "runtime.device: 'mps', but PyTorch sees no Apple GPU here; use auto or cpu"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8.00 GiB"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: str(error)[:10],
)
def test_too_little_memory_on_a_gpu_says_what_to_lower(error):
    with pytest.raises(UserError) as caught, enough_memory(torch.device("cuda", 1), "lower train.batch_size (512)"):
        raise error
    assert str(caught.value) == "cuda:1 ran out of memory; lower train.batch_size (512)"


def test_too_little_memory_on_the_cpu_says_what_to_lower():
    with pytest.raises(UserError) as caught, enough_memory(torch.device("cpu"), "lower train.batch_size (512)"):
        torch.empty(2**55)
    assert str(caught.value) == "cpu ran out of memory; lower train.batch_size (512)"


def test_other_errors_are_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="must match the size"), enough_memory(torch.device("cpu"), ""):
        torch.ones(2) + torch.ones(3)
