"""Several real processes that train as one: the same losses, states that serve any number of them, and the loss of one."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ddpm.errors import UserError
from ddpm.runtime import distributed
from ddpm.runtime.distributed import Group
from ddpm.training import validation
from ddpm.training.loop import train
from ddpm.training.step import Execution
from helpers import CPU, Recorder, class_images, free_port, params

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")} | {
    "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
}
TRAINING = """
import json, sys
from pathlib import Path

import torch

from ddpm.runtime.distributed import joined
from ddpm.errors import Stopped
from ddpm.training import validation
from ddpm.training.loop import train
from ddpm.training.step import Execution
from helpers import CPU, Recorder, class_images, params

validation.PREVIEW_STEPS = 2  # what a preview shows is of no interest here
folder, stop_at, precisions = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
losses = {}
with joined(CPU) as group:
    for precision in precisions:
        if precision == "float64":
            torch.set_default_dtype(torch.float64)
            torch.Tensor.float = torch.Tensor.double
        (states := folder / precision).mkdir(exist_ok=True)
        log = Recorder(stop_at=stop_at or None) if group.is_main else None
        p = params(batch_size=12, steps=100, model__dropout=0.0)
        try:
            train(p, class_images(), states if group.is_main else None, log, Execution(CPU, group=group))
        except Stopped:
            pass
        if group.is_main:
            losses[precision] = [value for (name, _), value in log.values.items() if name == "train/loss"]
    if group.is_main:
        (folder / f"losses-{group.world_size}.json").write_text(json.dumps(losses))
"""


def losses(folder: Path, processes: int, stop_at: int = 0, precisions: Sequence[str] = ("float32", "float64")) -> dict:
    """Of every step that so many processes trained in `folder`, where they went on from what it has."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    (script := folder / "training.py").write_text(TRAINING)
    command = ["python", script, folder, str(stop_at), *precisions]
    ranks = [{**ENVIRONMENT, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for environment in ranks]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    content = json.loads((folder / f"losses-{processes}.json").read_text())
    return {precision: torch.tensor(values, dtype=torch.float64) for precision, values in content.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The losses of one process."""
    return losses(tmp_path_factory.mktemp("alone"), 1)


def test_four_processes_have_the_losses_of_one(alone, tmp_path):
    found = losses(tmp_path, 4)
    assert len(found["float64"]) == 100
    assert (found["float64"] - alone["float64"]).abs().max() < 1e-9
    rounded = (found["float32"] - alone["float32"]).abs()
    assert rounded[:10].max() < 1e-5
    assert rounded.max() < 1e-3
    assert alone["float32"][-20:].mean() < alone["float32"][:20].mean() / 2  # there was something to learn


def test_a_state_serves_any_number_of_processes(alone, tmp_path):
    """Two are stopped, three are stopped, one ends it."""
    parts = [losses(tmp_path, n, stop_at, ["float64"])["float64"] for n, stop_at in ((2, 25), (3, 70), (1, 0))]
    assert [len(part) for part in parts[:2]] == [40, 40]  # a signal is heeded at the next look at the losses
    assert (torch.cat(parts) - alone["float64"]).abs().max() < 1e-9


def test_a_batch_in_parts_has_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "PREVIEW_STEPS", 2)

    def run(accumulate: int) -> torch.Tensor:
        (states := tmp_path / str(accumulate)).mkdir()
        log = Recorder()
        p = params(model__dropout=0.0, batch_size=7, steps=30)
        train(p, class_images(), states, log, Execution(CPU, accumulate=accumulate))
        return torch.tensor([value for (name, _), value in log.values.items() if name == "train/loss"])

    whole = run(1)
    for parts in (2, 3, 5):
        difference = (run(parts) - whole).abs()
        assert difference[:10].max() < 1e-5, parts
        assert difference.max() < 1e-3, parts


def test_too_small_a_batch_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"^params.yaml: train.batch_size: 8 images are too few for 2 processes in 5 parts each; lower "
    ):
        train(params(), class_images(), tmp_path, Recorder(), Execution(CPU, group=Group(0, 2), accumulate=5))


def test_what_nccl_says_is_told(monkeypatch):
    monkeypatch.setattr(distributed.time, "sleep", lambda _: None)
    ending = distributed._error_to_raise(torch.distributed.DistBackendError("Duplicate GPU detected\nmore"), 0)
    assert str(ending).startswith("Another process of this run was lost or is unreachable (Duplicate GPU detected). Run ")


def test_shares_are_all_of_it_and_as_equal_as_can_be():
    for size in range(1, 9):
        for count in range(size, 30):
            shares = [Group(rank, size).shard(list(range(count))) for rank in range(size)]
            assert [item for share in shares for item in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
