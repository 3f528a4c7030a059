"""What ``pytest --benchmark-only`` runs and ``python -m bench.check`` cross-checks."""
