"""The ``unichar`` command: parse, call, print."""
