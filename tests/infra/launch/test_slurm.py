"""The sbatch script, checked by shellcheck and run under programs that behave as Slurm's documentation says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.launch import Launch
from infra.launch.slurm import SlurmLauncher
from infra.processes import wait_until
from starflow.errors import ConfigError, StarflowError

Make = Callable[..., Launch]

#: Each task says who it is, waits for SIGTERM, and leaves as a preempted supervisor does.
TASK = (
    "bash",
    "-c",
    "trap 'exit 75' TERM;"
    " echo task $STARFLOW_NODE_RANK of $STARFLOW_NODES at $STARFLOW_ADDRESS launch $STARFLOW_LAUNCH;"
    " while true; do sleep 0.05; done",
)
#: srun: a task a node, each in a session of its own; exit status: the highest of them.
SRUN = """
tasks = []
command = ARGV[next(i for i, a in enumerate(ARGV) if not a.startswith('-')):]
for node in range(2):
    env = {**os.environ, 'SLURM_NODEID': str(node), 'SLURMD_NODENAME': f'gpu{node}'}
    tasks.append(subprocess.Popen(command, env=env, start_new_session=True))
(HERE / 'tasks').write_text(json.dumps([task.pid for task in tasks]))
sys.exit(max(task.wait() for task in tasks))
"""
#: scancel --signal: to the tasks of the steps, not to the batch script.
SCANCEL = """
if ARGV[0] == '--signal=TERM':
    for pid in json.loads((HERE / 'tasks').read_text()):
        os.killpg(pid, 15)
"""
SETTINGS = {"partition": "a100", "time": "04:00:00", "setup": "ulimit -n 4096", "options": ["--constraint=h100"]}


def slurm(launch: Launch) -> tuple[SlurmLauncher, Launch]:
    launcher = SlurmLauncher(launch.launch)
    return launcher, launch.model_copy(update={"handle": launcher.submit(launch)})


def calls(folder: Path, name: str) -> list[list[str]]:
    file = folder / f"{name}.calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_script_is_valid(make_launch: Make) -> None:
    launch = make_launch(on="slurm", nodes=4, gpus_per_node=8, cluster=SETTINGS)
    script = SlurmLauncher(launch.launch).render(launch)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    found = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-"], input=script, text=True, capture_output=True
    )
    assert found.returncode == 0, found.stdout
    for line in (
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--partition=a100",
        "--requeue",
        "--signal=B:USR1@120",
        "--open-mode=append",
        "--no-kill",
        "--constraint=h100",
    ):
        assert f"#SBATCH {line}\n" in script
    assert script.index("#SBATCH") < script.index("set -u")
    assert "None" not in script


def test_notice_saves_and_requeues(make_launch: Make, fake: Any, tmp_path: Path) -> None:
    """The batch script gets USR1 as before a time limit: tasks get SIGTERM, leave with 75, the job is re-queued."""
    fake("srun", SRUN)
    fake("scancel", SCANCEL)
    fake("scontrol", "")
    launch = make_launch(*TASK, on="slurm", nodes=2, cluster=SETTINGS)
    environment = {**os.environ, "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "3"}
    script = tmp_path / "job.sh"
    script.write_text(SlurmLauncher(launch.launch).render(launch))
    job = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        said = {job.stdout.readline().strip() for _ in range(2)}
        assert said == {f"task {k} of 2 at gpu{k} launch 20260102T030405-0123abcd.3" for k in (0, 1)}
        assert wait_until(lambda: (tmp_path / "tasks").exists(), seconds=60)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(100) == 75
    finally:
        job.kill()
        for pid in json.loads((tmp_path / "tasks").read_text()):
            with pytest.raises(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    assert calls(tmp_path, "scontrol") == [["requeue", "42"]]
    assert calls(tmp_path, "scancel") == [["--signal=TERM", "42"]]


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, "", False), (1, "", False), (75, "", True), (75, "99", True), (74, "", True), (74, "20", False)],
)
def test_only_what_can_go_on_is_requeued(
    make_launch: Make, fake: Any, tmp_path: Path, status: int, restarts: str, requeued: bool
) -> None:
    fake("srun", f"sys.exit({status})")
    fake("scontrol", "")
    script = SlurmLauncher(make_launch(on="slurm").launch).render(make_launch(on="slurm"))
    environment = {**os.environ, "SLURM_JOB_ID": "42", **({"SLURM_RESTART_COUNT": restarts} if restarts else {})}
    done = subprocess.run(["bash"], input=script, text=True, env=environment)
    assert done.returncode == status
    assert calls(tmp_path, "scontrol") == ([["requeue", "42"]] if requeued else [])


def test_submit_status_stop(make_launch: Make, fake: Any, tmp_path: Path) -> None:
    fake("sbatch", "(HERE / 'script').write_text(sys.stdin.read()); print('42;main')")
    fake("squeue", "print((HERE / 'squeue').read_text())")
    fake("scontrol", "print('gpu1\\ngpu2')")
    fake("scancel", "")
    launcher, launch = slurm(make_launch(on="slurm", nodes=2, cluster={"logs": str(tmp_path)}))
    assert (tmp_path / "script").read_text() == launcher.render(launch)
    assert launch.handle == {"job": "42", "log": f"{tmp_path}/starflow-my-run-0123abcd-42.log"}

    (tmp_path / "squeue").write_text("PENDING||Resources")
    assert [(node.state, node.detail) for node in launcher.nodes(launch)] == [("pending", "job 42: Resources")] * 2
    launcher.stop(launch, force=False)
    (tmp_path / "squeue").write_text("RUNNING|gpu[1-2]|None")
    assert [(node.state, node.host) for node in launcher.nodes(launch)] == [("running", "gpu1"), ("running", "gpu2")]
    launcher.stop(launch, force=False)
    launcher.stop(launch, force=True)
    assert calls(tmp_path, "scancel") == [["42"], ["--signal=TERM", "42"], ["42"]]

    (tmp_path / "starflow-my-run-0123abcd-42.log").write_text("one\ntwo\n")
    (tmp_path / "squeue").write_text("COMPLETED|gpu[1-2]|None")
    assert list(launcher.logs(launch, 0, follow=True)) == ["one", "two"]
    fake("squeue", "sys.exit('slurm_load_jobs error: Invalid job id specified')")
    assert {node.state for node in launcher.nodes(launch)} == {"ended"}
    fake("squeue", "sys.exit('Unable to contact slurm controller')")
    assert {node.state for node in launcher.nodes(launch)} == {"unknown"}


def test_refusals_are_one_sentence(make_launch: Make, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("sbatch", "sys.exit('sbatch: error: invalid partition specified: a100')")
    with pytest.raises(StarflowError, match=r"sbatch --parsable failed: .*invalid partition"):
        slurm(make_launch(on="slurm", cluster=SETTINGS))
    with pytest.raises(ConfigError, match=r"cluster settings of slurm \(.*did you mean partition"):
        slurm(make_launch(on="slurm", cluster={"partitions": "a"}))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StarflowError, match="sbatch is not installed here"):
        slurm(make_launch(on="slurm"))
