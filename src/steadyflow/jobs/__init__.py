"""The jobs of the command line: `steadyflow JOB` imports steadyflow.jobs.JOB and calls its run(config)."""
