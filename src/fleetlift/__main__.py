"""`python -m fleetlift`: the command line, or one of the workers that `serve` starts."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        from fleetlift.cli import worker

        worker.main()
    else:
        from fleetlift.cli import main

        main.main()
