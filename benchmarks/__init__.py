"""Every benchmark of fastnn: ``python -m benchmarks --help``. How they measure: docs/benchmarks.md."""
