"""Where it all runs: the local stack, launchers, Prefect deployments, and the demo."""
