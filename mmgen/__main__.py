"""`python -m mmgen`: the same as the command `mmgen`."""

from mmgen.cli.main import run

if __name__ == "__main__":
    run()
