"""The console command, also as `python -m sft_recipes`. Signals are heard before anything heavy is imported."""

import sys

from sft_recipes import stop_request


def main() -> None:
    """Run the command line. Of its commands only `train` has something to save when a signal ends it."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if arguments[:1] == ["train"]:
        stop_request.listen()
    try:
        from sft_recipes import cli

        code = cli.run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules load
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
