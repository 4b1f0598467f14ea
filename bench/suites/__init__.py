"""pytest-benchmark suites: `make bench-pytest`, or pytest bench/suites in a checkout."""
