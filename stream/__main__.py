"""`python -m stream` is `livesat`."""

from stream.cli import main

if __name__ == "__main__":
    main()
