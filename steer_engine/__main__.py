"""`python -m steer_engine` is the command line."""

from .cli import main

main()
