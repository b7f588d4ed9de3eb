"""Give a SLURM job that was told to end back to its queue, once its run is saved."""

import os
import subprocess
import sys

LONGEST_WAIT = 10  # seconds


def requeue() -> None:
    """Ask SLURM to start this job again; outside of a job do nothing.

    Lightning does so at SIGUSR1, and submitit at SIGUSR2. Lightning would save in the middle of a step,
    beside the working folder's other files, and a later run of the same folder would start from that file.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not job or not job.replace("_", "").isdecimal():
        return
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_WAIT)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        print(f"warning: {' '.join(command)}: {reason}", file=sys.stderr)
    else:
        print(f"job {job} is back in SLURM's queue; resume=auto and run_dir let it go on", file=sys.stderr)
