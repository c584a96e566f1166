"""What every driver shares: command line, run folder, metrics, progress, plots."""
