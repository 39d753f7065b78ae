"""`python -m zoo`: the `zoo` command, also for programs that start modules, such as torchrun."""

from zoo.cli import main

if __name__ == "__main__":
    main()
