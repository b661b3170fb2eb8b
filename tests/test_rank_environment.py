"""What torchrun's environment variables mean where torchrun didn't set them: nothing, or an error with a next step."""

import pytest

from llama import LlamaError
from llama._util import ranks
from llama._util.ranks import checked_env_rank, env_rank


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No process group, and none of the variables."""
    for name in (*ranks.NAMES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, text: str) -> None:
    for assignment in text.split():
        environment.setenv(*assignment.split("=", 1))


@pytest.mark.parametrize("text", ["", "LOCAL_RANK=1", "RANK=1", "WORLD_SIZE=4", "LOCAL_RANK=1 WORLD_SIZE=2", "RANK=x"])
def test_one_process_without_torchrun(environment: pytest.MonkeyPatch, text: str) -> None:
    set_all(environment, text)
    assert env_rank() == checked_env_rank() == (0, 1, 0)
    assert ranks.is_main_process()


def test_what_torchrun_sets(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=localhost MASTER_PORT=29500")
    assert env_rank() == checked_env_rank() == (5, 8, 1)
    set_all(environment, "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0")
    assert checked_env_rank() == (0, 1, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("RANK=1 WORLD_SIZE=2", "RANK='1', WORLD_SIZE='2', and no LOCAL_RANK"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1", "LOCAL_RANK='1', and no MASTER_ADDR and no MASTER_PORT"),
        ("RANK=x WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=1", "RANK='x'"),
        ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "RANK='2', WORLD_SIZE='2'"),
        ("RANK=0 WORLD_SIZE=-1 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE='-1'"),
        ("RANK=0 WORLD_SIZE=two LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE='two'"),
    ],
)
def test_several_processes_not_as_torchrun_starts_them(environment: pytest.MonkeyPatch, text: str, says: str) -> None:
    set_all(environment, text)
    with pytest.raises(LlamaError) as caught:
        checked_env_rank()
    assert says in str(caught.value) and "start with torchrun" in str(caught.value)
