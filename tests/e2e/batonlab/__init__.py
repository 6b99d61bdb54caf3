"""Runs the whole of Baton on one machine for tests, benchmarks and the demo: batond, agents as hosts, storage daemons,
a Linux guest. Everything that it starts carries an environment variable, by which it is found again and ended."""
