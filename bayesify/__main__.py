"""`python -m bayesify`."""

from bayesify.cli import main

if __name__ == "__main__":
    main()
