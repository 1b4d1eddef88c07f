"""A study on Slurm: every node a job, all queued at once; dependencies do the rest and no process stays alive.

A job runs `launch/study.py --slurm ... run NODE`; its launchers go through launch/slurm/train.sbatch as a script, which
starts torchrun on each of the job's nodes. A job that is out of time saves and is queued again; one that fails takes
those behind it out of the queue.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prism_mcore.config import SettingsError
from prism_mcore.console import say
from prism_mcore.study import record
from prism_mcore.study.graph import Command, Node, folder_of, full_argv
from prism_mcore.study.settings import StudyProgram

SCRIPT = "launch/slurm/study.sbatch"


def submit(study: StudyProgram, nodes: Mapping[str, Node], words: Sequence[str]) -> int:
    """Queue every node that is not done; returns how many. Raises SettingsError without sbatch, where jobs of this
    study are in the queue already, and where Slurm refuses one: then none stays queued.

    words: --recipe FILE and settings, as a job's command needs them.
    """
    if shutil.which("sbatch") is None:
        raise SettingsError("--slurm needs Slurm's sbatch, which is not on the PATH; without --slurm it runs here")
    refuse_queued(study)
    ids: dict[str, str] = {}
    for node in nodes.values():
        if not record.reasons(node, nodes):
            continue
        before = [ids[need] for need in node.needs if need in ids]
        done = subprocess.run(sbatch_argv(study, node, words, before), capture_output=True, text=True, check=False)
        if done.returncode:
            if ids:
                subprocess.run(["scancel", *ids.values()], check=False)
            raise SettingsError(f"sbatch refuses {node.name}: {done.stderr.strip()}; nothing stays queued")
        ids[node.name] = done.stdout.strip().split(";")[0]
        after = f" after {', '.join(before)}" if before else ""
        say(f"{node.name}: job {ids[node.name]}{after}")
    return len(ids)


def sbatch_argv(study: StudyProgram, node: Node, words: Sequence[str], before: Sequence[str]) -> list[str]:
    """The command that queues a node after the jobs `before`."""
    how = study.study
    ranks = min(node.ranks, how.gpus_per_node)
    argv = ["sbatch", "--parsable", "--requeue", "--open-mode=append", "--signal=USR1@600", f"--time={how.time}"]
    argv += [f"--job-name={node.name}", f"--comment={mark(study)}", "--ntasks-per-node=1"]
    argv += [f"--nodes={-(-node.ranks // how.gpus_per_node)}", f"--output={folder_of(study)}/slurm/{node.name}.log"]
    argv += [f"--gpus-per-node={ranks}"] if how.gpus else [f"--export=ALL,RANKS_PER_NODE={ranks}"]
    argv += [f"--partition={how.partition}"] if how.partition else []
    argv += [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []
    return [*argv, *how.sbatch, SCRIPT, *words, "run", node.name]


def job_argv(command: Command) -> list[str]:
    """A command inside a job: launchers on all its nodes, tools on the first."""
    program = Path(command.argv[0])
    if program.parent.name == "launch" and program.stem in ("midtrain", "rl", "evaluate"):
        return ["bash", "launch/slurm/train.sbatch", program.stem, *command.argv[1:]]
    return [sys.executable, *command.argv] if program.suffix == ".py" else full_argv(command)


def mark(study: StudyProgram) -> str:
    """What all jobs of a study's folder have as their comment."""
    return f"study:{folder_of(study).absolute()}"


def queued(study: StudyProgram) -> dict[str, str]:
    """Node -> `RUNNING, job 7` of this study's jobs in the queue; nothing where there is no Slurm."""
    if shutil.which("squeue") is None:
        return {}
    argv = ["squeue", "--noheader", "--format=%i|%j|%T|%k"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    jobs = [line.split("|", 3) for line in done.stdout.splitlines()]
    return {name: f"{state}, job {number}" for number, name, state, comment in jobs if comment.strip() == mark(study)}


def refuse_queued(study: StudyProgram) -> None:
    """Raise SettingsError where jobs of this study wait or run."""
    if found := queued(study):
        name, state = next(iter(found.items()))
        raise SettingsError(
            f"{len(found)} jobs of this study are in the queue ({name}: {state}); wait for them, or scancel them"
        )
