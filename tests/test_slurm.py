"""The Slurm scripts, run with stand-ins for Slurm: the command lines, who gets TERM, what is requeued, which exit code.

No test ran on a real Slurm. What the stand-ins do is what its manual and source say: `srun` kills its tasks on TERM,
`scancel --signal` reaches the tasks but not their children.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft_recipes.recipe import launch_config
from sft_recipes.recipe_keys import load_recipe

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

# Everything they are asked is appended to `calls` in the folder FAKE.
STANDINS = {
    "srun": """
        echo srun "$@" >>"$FAKE/calls"; trap 'kill -KILL $(cat "$FAKE/tasks")' TERM
        for word in "$@"; do
            case $word in --ntasks=*) tasks=${word#*=} ;; esac
            case $word in --*) shift ;; *) break ;; esac
        done
        for ((node = 0; node < tasks; node++)); do
            SLURM_NODEID=$node "$@" & pids+=($!); echo $! >>"$FAKE/tasks"
        done
        for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > worst)) && worst=$code; done; exit "${worst:-0}"
    """,
    "scancel": 'echo scancel "$@" >>"$FAKE/calls"; [ "$1" = --signal=TERM ] && kill -TERM $(cat "$FAKE/tasks")',
    "scontrol": """
        echo scontrol "$@" >>"$FAKE/calls"
        [ "$1 $2" = "show hostnames" ] && for ((i = 0; i < SLURM_NNODES; i++)); do echo "${FAKE_HOST:-node$i}"; done
    """,
    "squeue": 'echo "${FAKE_JOB_STATE:-RUNNING}"',
    # As torchrun: two ranks; a TERM kills them; any failure ends in 1.
    "accelerate": """
        echo "HF_HUB_OFFLINE=$HF_HUB_OFFLINE" accelerate "$@" >>"$FAKE/launched.$SLURM_NODEID"
        trap 'echo launcher >>"$FAKE/terms"; kill -KILL "${pids[@]}"; exit 1' TERM
        if [ "$FAKE_RANKS" = slow_start ]; then
            mkfifo "$FAKE/ready.$SLURM_NODEID"; while :; do read -r -t 0.05 <>"$FAKE/ready.$SLURM_NODEID"; done
        fi
        for local in 0 1; do rank & pids+=($!); done
        for pid in "${pids[@]}"; do wait "$pid" || failed=1; done; exit "${failed:-0}"
    """,
    "rank": """
        says() { printf '{\\n  "state": "%s",\\n  "exit_code": %s\\n}\\n' "$1" "$2" >"$FAKE_STATE"; }
        case $FAKE_RANKS in
        finish) says finished 0 ;;
        fault) says failed 3; exit 3 ;;
        crash) exit 9 ;;
        wait)
            trap 'echo rank >>"$FAKE/terms"; says preempted 75; exit 75' TERM
            touch "$FAKE/ready.$SLURM_NODEID.$$"; while :; do sleep 0.05; done ;;
        killed)
            trap 'echo rank >>"$FAKE/terms"; exit 137' TERM
            touch "$FAKE/ready.$SLURM_NODEID.$$"; while :; do sleep 0.05; done ;;
        esac
    """,
}


class Cluster:
    """A folder of stand-ins, and jobs started with them."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.jobs: list[subprocess.Popen[str]] = []
        self.run_folder = folder / "run"
        self.run_folder.mkdir()
        (folder / "bin").mkdir()
        for name, body in STANDINS.items():
            file = folder / "bin" / name
            file.write_text(f"#!/bin/bash\n{body}")
            file.chmod(0o755)

    def submit(
        self, script: Path, recipe: str = "recipe.yaml", *more: str, **environment: str
    ) -> subprocess.Popen[str]:
        """Start a job as `sbatch` would; `environment` adds to it."""
        for name in ("calls", "tasks", "terms"):
            (self.folder / name).write_text("")
        variables = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "FAKE": str(self.folder),
            "FAKE_STATE": str(self.run_folder / "run_state.json"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[0-9]",
            "SLURM_NNODES": str(self.nodes),
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_CPUS_PER_TASK": "16",
            **environment,
        }
        variables.pop("HF_HUB_OFFLINE", None)
        command = ["bash", str(script), recipe, str(self.run_folder), *more]
        pipe = subprocess.PIPE
        options = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True}
        self.jobs.append(subprocess.Popen(command, cwd=self.folder, env=variables, **options))
        return self.jobs[-1]

    def shut_down(self) -> None:
        """Kill what a failed test left."""
        for job in self.jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
            job.communicate()

    def lines(self, name: str) -> list[str]:
        """The lines that the stand-ins wrote to one of their files."""
        return (self.folder / name).read_text().splitlines()

    def requeued(self) -> int:
        """How often the job asked to be requeued."""
        return self.lines("calls").count("scontrol requeue 4711")


def nodes_of(script: Path) -> int:
    """How many machines a script is tried with."""
    return 1 if script.stem == "single" else 3


@pytest.fixture
def cluster(tmp_path: Path, script: Path) -> Iterator[Cluster]:
    """A cluster for the script of this test."""
    cluster = Cluster(tmp_path, nodes_of(script))
    yield cluster
    cluster.shut_down()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Look again and again until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def ended(job: subprocess.Popen[str], seconds: float = 30) -> tuple[int, str]:
    """Exit code and stderr of a job."""
    _, err = job.communicate(timeout=seconds)
    return job.returncode, err


@by_script
def test_command_lines(script: Path, cluster: Cluster) -> None:
    """One launcher a machine, with its own rank, all processes counted, one meeting point, offline, overrides last."""
    code, err = ended(
        cluster.submit(script, "r.yaml", "--learning_rate", "1e-5", FAKE_RANKS="finish")
    )
    assert code == 0 and "is not prepared" in err
    (step,) = [line for line in cluster.lines("calls") if line.startswith("srun ")]
    assert step.startswith(
        f"srun --ntasks-per-node=1 --ntasks={cluster.nodes} --cpus-per-task=16 --kill-on-bad-exit=1 bash -c "
    )
    meeting = {
        "single": "--num_machines 1 --num_processes 2",
        "multi_node": "--num_machines 3 --num_processes 6 --main_process_ip node0 --main_process_port 24711",
    }
    config = launch_config({"single": "ddp"}.get(script.stem, script.stem))
    for node in range(cluster.nodes):
        assert cluster.lines(f"launched.{node}") == [
            f"HF_HUB_OFFLINE=1 accelerate launch --machine_rank {node} --config_file {config} {meeting[script.stem]} "
            f"-m sft_recipes.training.train --config r.yaml --output_dir {cluster.run_folder} --learning_rate 1e-5"
        ]


@by_script
def test_another_launch(script: Path, cluster: Cluster) -> None:
    """LAUNCH names another config; an unknown one ends the job with exit code 2 before anything is started."""
    assert ended(cluster.submit(script, FAKE_RANKS="finish", LAUNCH="fsdp2"))[0] == 0
    assert f"--config_file {launch_config('fsdp2')} " in cluster.lines("launched.0")[0]
    code, err = ended(cluster.submit(script, FAKE_RANKS="finish", LAUNCH="fsdp22"))
    assert (
        code == 2 and "there is no accelerate config 'fsdp22'" in err and not cluster.lines("calls")
    )


# What the ranks do, the state that an earlier job left, and what the job does then: exit code, times requeued.
ENDS: dict[str, tuple[dict[str, str], str, int, int]] = {
    "finished": ({"FAKE_RANKS": "finish"}, "", 0, 0),
    "nothing left to do": ({"FAKE_RANKS": "nothing"}, "finished", 0, 0),
    "training fault": ({"FAKE_RANKS": "fault"}, "running", 3, 0),
    "crash without a word": ({"FAKE_RANKS": "crash"}, "", 1, 0),
    "crash after an earlier preemption": ({"FAKE_RANKS": "crash"}, "preempted", 1, 0),
}


@by_script
@pytest.mark.parametrize("case", ENDS)
def test_ends_by_themselves(case: str, script: Path, cluster: Cluster) -> None:
    """The exit code is the run's own, not the launcher's, and only a preempted run is requeued."""
    environment, before, expected, requeued = ENDS[case]
    if before:
        (cluster.run_folder / "run_state.json").write_text(f'{{\n  "state": "{before}"\n}}\n')
    assert ended(cluster.submit(script, **environment))[0] == expected
    assert cluster.requeued() == requeued


STOPS: dict[str, tuple[dict[str, str], int, str]] = {
    "time limit": ({"FAKE_RANKS": "wait"}, 1, "rank"),
    "ranks killed before they could save": ({"FAKE_RANKS": "killed"}, 1, "rank"),
    "before there are ranks": ({"FAKE_RANKS": "slow_start"}, 1, "launcher"),
    "cancelled by hand": ({"FAKE_RANKS": "wait", "FAKE_JOB_STATE": "COMPLETING"}, 0, "rank"),
    "too often": ({"FAKE_RANKS": "wait", "SLURM_RESTART_COUNT": "100"}, 0, "rank"),
    "not yet too often": ({"FAKE_RANKS": "wait", "SLURM_RESTART_COUNT": "99"}, 1, "rank"),
}


# Where Slurm stops the tasks without telling the script, it requeues the job by itself; only a saved state says more.
TOLD = [(case, whom) for case in STOPS for whom in ("script", "both")]
TOLD += [
    (case, "tasks")
    for case, (environment, *_) in STOPS.items()
    if environment["FAKE_RANKS"] == "wait"
]


@by_script
@pytest.mark.parametrize(("case", "whom"), TOLD)
def test_stopped(case: str, whom: str, script: Path, cluster: Cluster) -> None:
    """TERM to the script, as before a time limit, or to the tasks, as at a preemption, or to both: every rank gets it
    exactly once and its launcher not at all; the job is requeued unless it was cancelled, and ends with 75.
    """
    environment, requeued, who = STOPS[case]
    job = cluster.submit(script, **environment)
    expected = cluster.nodes * (1 if who == "launcher" else 2)
    wait_until(lambda: len(list(cluster.folder.glob("ready.*"))) == expected)
    if whom != "script":
        for pid in map(int, cluster.lines("tasks")):
            os.kill(pid, signal.SIGTERM)
    if whom != "tasks":
        job.send_signal(signal.SIGTERM)
    assert ended(job)[0] == 75
    assert cluster.lines("terms") == [who] * expected
    assert cluster.requeued() == requeued


def test_both_scripts_end_alike() -> None:
    """What single and multi_node share is the same text, so it cannot drift apart."""
    parts = [path.read_text().partition("# ---- from here on")[2] for path in SCRIPTS]
    assert len(parts) == 2 and parts[0] and parts[0] == parts[1]


@by_script
def test_what_slurm_reads(script: Path) -> None:
    """Requeue is allowed, the script gets TERM before the time limit, one task a machine, one log."""
    options = [
        shlex.split(line, comments=False)[1]
        for line in script.read_text().splitlines()
        if "#SBATCH --" in line
    ]
    assert {"--requeue", "--ntasks-per-node=1", "--open-mode=append", "--signal=B:TERM@300"} <= set(
        options
    )


@by_script
def test_shellcheck(script: Path) -> None:
    """No finding of shellcheck."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(
        ["shellcheck", str(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.fixture
def two_machines(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Two "machines" on this one, with the real accelerate and one CPU process each."""
    cluster = Cluster(tmp_path, nodes=2)
    (cluster.folder / "bin/accelerate").write_text(
        f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n'
    )

    def submit(recipe: Path, *more: str) -> subprocess.Popen[str]:
        job_id = str(random.randrange(20_000))  # decides the port
        given = {
            "LAUNCH": "ddp_cpu",
            "FAKE_HOST": "127.0.0.1",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_JOB_ID": job_id,
        }
        return cluster.submit(REPOSITORY / "slurm/multi_node.sbatch", str(recipe), *more, **given)

    yield submit
    cluster.shut_down()


@pytest.mark.slow
def test_two_machines_train_what_one_process_trains(
    two_machines: Callable[..., subprocess.Popen[str]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The script's command line, with the real launcher on two "machines": one run, with the losses of one process."""
    from sft_recipes.training.train import train
    from tests.training.tiny import logged

    path = write_recipe(global_batch_size=8, per_device_train_batch_size=4, output_dir="./one")
    code, err = ended(two_machines(path), seconds=280)
    assert code == 0, err[-3000:]
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["processes"] == 2
    one = train(load_recipe(path))
    assert len(logged(one)) == 5 and logged(tmp_path / "run") == pytest.approx(
        logged(one), rel=1e-5
    )


@pytest.mark.slow
def test_two_machines_go_on_after_a_preemption(
    two_machines: Callable[..., subprocess.Popen[str]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """TERM to the job while both "machines" train: one sealed checkpoint, one requeue; the job started again ends with
    exactly the weights of one that was never stopped.
    """
    from tests.training.tiny import file_hashes

    long = {
        "num_train_epochs": None,
        "max_steps": 150,
        "save_strategy": "no",
        "learning_rate": 1e-5,
    }
    path = write_recipe(global_batch_size=8, per_device_train_batch_size=4, **long)
    log, state = tmp_path / "run/log.jsonl", tmp_path / "run/run_state.json"
    job = two_machines(path)
    wait_until(lambda: log.is_file() and log.read_text().count("\n") > 3, seconds=120)
    job.send_signal(signal.SIGTERM)
    code, err = ended(job, seconds=120)
    assert code == 75 and json.loads(state.read_text())["state"] == "preempted", err[-3000:]
    calls = (tmp_path / "calls").read_text()
    assert "scancel --signal=TERM" in calls and calls.count("scontrol requeue") == 1
    assert len(list((tmp_path / "run").glob("checkpoint-*/manifest.json"))) == 1
    for _ in range(2):
        code, err = ended(two_machines(path), seconds=280)
        assert code == 0, err[-3000:]
        if not (tmp_path / "first").exists():
            (tmp_path / "run").rename(tmp_path / "first")
            (tmp_path / "run").mkdir()
    weights = [file_hashes(tmp_path / name)["model.safetensors"] for name in ("first", "run")]
    assert weights[0] == weights[1]
