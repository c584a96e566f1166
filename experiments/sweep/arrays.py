"""Scripts that run the jobs of a sweep on a cluster: an array job of Slurm, Indexed Jobs of GKE.

Every index runs `eggroll sweep FILE --index I`, which does nothing where its runs are done, and goes on with
them where it was cut off. All indices share the sweep's folder. With successive halving there is an array a
rung, which begins when the rung below has ended.
"""

import shlex
from pathlib import Path
from typing import Any

from experiments.run.errors import RUN_ME_AGAIN
from experiments.run.folder import write_whole
from experiments.sweep.records import Records


def write_scripts(records: Records) -> str:
    """Writes them into the sweep's folder.

    Returns:
        How they are started, in words.
    """
    if records.spec.executor.kind == "slurm":
        return _slurm(records)
    return _gke(records)


def _slurm(records: Records) -> str:
    spec, executor = records.spec, records.spec.executor
    jobs = len(records.plan.jobs)
    head = [
        f"--job-name={shlex.quote(spec.out.name)}",
        f"--array=0-{jobs - 1}%{executor.at_once}",
        f"--output={spec.out}/logs/slurm-%A-%a.log",
        # SIGTERM two minutes before the end of the time: the run saves, and ends with exit code 75.
        "--signal=B:TERM@120",
        "--requeue",
        *executor.sbatch,
    ]
    words = [*executor.command, "sweep", str(spec.out / "sweep.yaml"), "--index"]
    rung = ' --rung "$RUNG"' if spec.rungs else ""
    script = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in head),
        "",
        f"# {len(records.plan.runs)} runs in {jobs} jobs. An index that is run again goes on where it was.",
        "set -u",
        'cd "${SLURM_SUBMIT_DIR:-.}"',
        *executor.setup.rstrip("\n").split("\n"),
        # In the background, so that the shell passes the signal on while it waits.
        f'{shlex.join(words)} "$SLURM_ARRAY_TASK_ID"{rung} &',
        "child=$!",
        "trap 'kill -TERM \"$child\"' TERM",
        'wait "$child"; code=$?',
        "# A wait that a signal cut short says nothing of the command.",
        'while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done',
        f'if [ "$code" -eq {RUN_ME_AGAIN} ] && [ -n "${{SLURM_JOB_ID:-}}" ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    path = spec.out / "sweep.sbatch"
    _write(path, "\n".join(script) + "\n")
    (spec.out / "logs").mkdir(exist_ok=True)  # Slurm does not make it
    command = f"sbatch {shlex.quote(str(path))}"
    if spec.rungs:
        path = spec.out / "submit.sh"
        lines = [
            "#!/bin/bash",
            "# One array a rung; each begins when the one below has ended.",
            "set -eu",
        ]
        after = ""
        for number in range(len(spec.rungs)):
            lines.append(
                f"job=$(sbatch --parsable --export=ALL,RUNG={number}{after} "
                f"{shlex.quote(str(spec.out / 'sweep.sbatch'))})"
            )
            after = ' --dependency=afterany:"$job"'
        _write(path, "\n".join([*lines, 'echo "The last rung is job $job."']) + "\n")
        command = f"bash {shlex.quote(str(path))}"
    return f"Wrote {path}. Start it with: {command}. Then the same command again tells what it came to."


def _gke(records: Records) -> str:
    import yaml

    spec = records.spec
    rungs: tuple[int | None, ...] = tuple(range(len(spec.rungs))) or (None,)
    commands = []
    for rung in rungs:
        manifest = gke_manifest(records, rung)
        name = "sweep-job.yaml" if rung is None else f"sweep-job-{rung}.yaml"
        _write(spec.out / name, yaml.safe_dump(manifest, sort_keys=False))
        commands.append(f"kubectl apply -f {shlex.quote(str(spec.out / name))}")
        if rung is not None and rung < len(rungs) - 1:
            job = manifest["metadata"]["name"]
            # A job of which an index failed is never complete, and the others of its rung may go on.
            ended = f"kubectl get job/{job} -o 'jsonpath={{.status.conditions[*].type}}'"
            commands.append(f"until {ended} | grep -qwE 'Complete|Failed'; do sleep 30; done")
    return (
        f"Wrote the manifest{'s' * (len(rungs) > 1)} in {spec.out}. With {spec.out / 'sweep.yaml'} in the "
        f"shared folder, start with: {' && '.join(commands)}. Then the same command again, where that folder "
        "is, tells what it came to."
    )


def gke_manifest(records: Records, rung: int | None) -> dict[str, Any]:
    """An Indexed Job: one pod an index, each with tries of its own."""
    spec, executor = records.spec, records.spec.executor
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in spec.out.name.lower())
    name = (name.strip("-") or "sweep")[:40].rstrip("-")
    words = [*executor.command, "sweep", str(spec.out / "sweep.yaml"), "--index"]
    line = f'exec {shlex.join(words)} "$JOB_COMPLETION_INDEX"' + f" --rung {rung}" * (
        rung is not None
    )
    container = {
        "name": "run",
        "image": executor.image,
        "workingDir": executor.mount,
        "command": ["/bin/sh", "-c", line],
        "resources": {"limits": dict(executor.resources)},
        "volumeMounts": [{"name": "sweep", "mountPath": executor.mount}],
    }
    interrupted = {
        "action": "Ignore",
        "onExitCodes": {"containerName": "run", "operator": "In", "values": [RUN_ME_AGAIN]},
    }
    evicted = {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    count = len(records.plan.jobs)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name if rung is None else f"{name}-rung-{rung}"},
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": min(count, executor.at_once),
            "backoffLimitPerIndex": 2,
            # What fails is written down, and the others go on.
            "maxFailedIndexes": count,
            "podFailurePolicy": {"rules": [interrupted, evicted]},
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 120,
                    "nodeSelector": dict(executor.nodes),
                    "containers": [container],
                    "volumes": [
                        {"name": "sweep", "persistentVolumeClaim": {"claimName": executor.claim}}
                    ],
                }
            },
        },
    }


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
