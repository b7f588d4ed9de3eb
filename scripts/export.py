"""Write a finished run as a folder that transformers opens without further code.

python scripts/export.py checkpoint=RUN_DIR to=transformers out=DIR
"""

import shlex
import sys
from pathlib import Path

from windowlm.command_line import Command, Invocation, main
from windowlm.config import ExportConfig


def export(config: ExportConfig, invocation: Invocation) -> int:
    """Import torch and the rest only once the settings are known to be right."""
    from windowlm.export_run import export_run

    written = export_run(Path(config.checkpoint), Path(config.out))
    print(f"{written['architectures'][0]} in {shlex.quote(config.out)}")
    return 0


if __name__ == "__main__":
    command = Command(name="export", config_type=ExportConfig, task=export)
    sys.exit(main(command, Path(__file__), Path(__file__).parents[1] / "conf"))
