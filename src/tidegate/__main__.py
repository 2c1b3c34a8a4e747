"""``python -m tidegate``."""

from tidegate.cli.entry import main

if __name__ == "__main__":
    main()
