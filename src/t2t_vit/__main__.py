"""Run the command line as `python -m t2t_vit`."""

from t2t_vit_cli import entry

if __name__ == '__main__':
    entry()
