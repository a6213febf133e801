"""``python -m steerclear`` is the command ``steerclear``."""

from steerclear.app.cli import main

if __name__ == "__main__":
    main(prog_name="steerclear")
