"""``python -m raydiff``: the command line."""

from raydiff.cli import main

if __name__ == "__main__":
    main()
