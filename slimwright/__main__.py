"""``python -m slimwright`` is the command line."""

from slimwright.cli import main

if __name__ == "__main__":
    main()
