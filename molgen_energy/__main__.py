"""Starts the command line. Every worker process reads this file, so it imports nothing at first."""


def main() -> None:
    """Entry point of `molgen-energy` and of `python -m molgen_energy`."""
    from molgen_energy import cli

    cli.main()


if __name__ == "__main__":
    main()
