"""The command `linkrx`."""

INTERRUPTED = 128 + 2  # a shell's exit code for a program that SIGINT ended


def run() -> int:
    """Run the command of this process, and return its exit code. Ctrl-C ends it also while Python still imports the command."""
    try:
        from linkrx.cli.main import main

        return main()
    except KeyboardInterrupt:
        return INTERRUPTED
