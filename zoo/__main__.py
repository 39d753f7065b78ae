"""The `zoo` command, which `python -m zoo` is too, also for programs that start modules, such as torchrun."""

import sys


def main() -> None:
    """As `zoo.cli.main`, and as quiet where it is interrupted before that is imported."""
    try:
        from zoo.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("\nzoo: interrupted\n")
        sys.exit(130)
    main()


if __name__ == "__main__":
    main()
