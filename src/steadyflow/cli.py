"""The command `steadyflow`. Everything a job needs (Hydra, torch) is imported once a job is known."""

import difflib
import os
import sys
from importlib.util import find_spec

from steadyflow import __version__

JOBS = {
    "train": "train a network on a dataset: any path, parametrization and loss weight",
    "sample": "sample a checkpoint, score the samples and draw them",
    "restore": "solve inverse problems (deblurring, inpainting, super-resolution) with a checkpoint",
    "invert": "find the noise that a sampler turns into given images",
    "evaluate": "score a folder, zip or npz of images against a dataset or a statistics file",
    "table": "run the cells of a table and print it beside the published numbers",
    "report": "gather the metrics of finished runs into one page",
    "prepare": "fetch and check a dataset, or a public checkpoint",
}

USAGE = """\
usage: steadyflow JOB [key=value ...]        for example: steadyflow sample sampler=heun sampler.steps=18

jobs:
{jobs}

  steadyflow JOB --help           the config groups with their options, and the config they compose to
  steadyflow JOB --cfg job        the composed config alone
  steadyflow JOB -m key=1,2       a sweep: one run for every combination of values
  steadyflow JOB --config-dir DIR configs of your own join the groups; `_target_` may name modules of the
                                  working directory
  steadyflow --version

tab completion of jobs, groups and keys:
  bash, zsh    eval "$(steadyflow -sc install=bash)"     (zsh: autoload -Uz bashcompinit && bashcompinit first)
  fish         steadyflow -sc install=fish | source

HYDRA_FULL_ERROR=1 shows the traceback behind a one-line error."""


VALUED = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c"}


def built(job: str) -> bool:
    """Whether this version has the job."""
    return find_spec(f"steadyflow.jobs.{job}") is not None


def main(argv: list[str] | None = None) -> int:
    """Run `steadyflow ARGV...` (default: the command line).

    Returns:
        The exit code: 0 done, 2 a mistake in the command, the config or the data (said in one line), 130 interrupted.
        Bugs keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    at = _job_at(argv)
    if at is None:
        return _without_job(argv)
    job, rest = argv[at], argv[:at] + argv[at + 1 :]
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS, n=1, cutoff=0.5)
        return _refuse(
            f"no job '{job}'." + (f" Did you mean {' or '.join(near)}?" if near else f" Jobs: {' '.join(JOBS)}")
        )
    if not built(job):
        return _refuse(f"'{job}' is not built yet in version {__version__}. Built: {' '.join(filter(built, JOBS))}")
    try:
        from steadyflow.launch import launch

        return launch(job, rest)
    except KeyboardInterrupt:  # while importing
        print(f"steadyflow {job}: interrupted", file=sys.stderr)
        return 130


def _job_at(words: list[str]) -> int | None:
    """The first word that is no flag, no flag's value and no override: `steadyflow -m sample` is fine too."""
    previous = ["", *words]
    return next(
        (i for i, w in enumerate(words) if w[:1] not in ("-", "") and "=" not in w and previous[i] not in VALUED), None
    )


def _without_job(argv: list[str]) -> int:
    if "--version" in argv:
        print(f"steadyflow {__version__}")
        return 0
    if argv and argv[0] in ("-sc", "--shell-completion"):
        return _complete(argv)
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, JOBS)) + 2
        jobs = [f"  {job:{width}}{line}{'' if built(job) else ' (not built yet)'}" for job, line in JOBS.items()]
        print(USAGE.format(jobs="\n".join(jobs)))
        return 0
    return _refuse(f"'{' '.join(argv)}' names no job. Jobs: {' '.join(JOBS)}")


def _complete(argv: list[str]) -> int:
    """Hydra's tab completion, with the job as the first word of the line."""
    words = os.environ.get("COMP_LINE", "").split(" ")[1:]
    at = _job_at(words)
    if argv[1].startswith("query") and (at is None or at == len(words) - 1):
        print(" ".join(job for job in JOBS if job.startswith(words[at] if at is not None else "") and built(job)))
        return 0
    from steadyflow.launch import launch

    job = "sample"  # `install` prints the same script for any
    if argv[1].startswith("query") and at is not None:
        job = words.pop(at)
        os.environ["COMP_LINE"] = " ".join(["steadyflow", *words])
        if job not in JOBS or not built(job):
            return 0
    return launch(job, argv)


def _refuse(message: str) -> int:
    print(f"steadyflow: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
