"""Draw which keys each query sees, in the terminal and as PNG.

python scripts/show_attention.py window=4 sequence_length=12 documents=[5,7] [sinks=1] [output_file=PNG]

The PNG is attention.png in the current folder unless output_file= names another, or null for none.
"""

import os
import sys
from pathlib import Path

from windowlm.command_line import Command, Invocation, main
from windowlm.config import ShowAttentionConfig
from windowlm.errors import UserError

PIXELS_PER_INCH = 144


def show(config: ShowAttentionConfig, invocation: Invocation) -> int:
    """Import torch and the rest only once the settings are known to be right."""
    from io import BytesIO

    import vl_convert
    from PIL import Image
    from rich.console import Console

    if config.output_file is not None and not os.access(Path(config.output_file).parent, os.W_OK):
        raise UserError(
            f"output_file={config.output_file}: a name in a folder that can be written is allowed; "
            "try output_file=attention.png"
        )
    # rich would break rows that are wider than the terminal at spaces.
    Console().print(config.text(), soft_wrap=True)
    if config.output_file is not None:
        png = vl_convert.vegalite_to_png(config.chart().to_dict(), ppi=PIXELS_PER_INCH)
        try:
            # The renderer hardly compresses.
            Image.open(BytesIO(png)).save(config.output_file, format="PNG", optimize=True)
        except OSError as error:
            raise UserError(
                f"output_file={config.output_file}: cannot be written ({error.strerror or error})"
            ) from None
        print(f"\nwritten to {Path(config.output_file).absolute()}")
    return 0


if __name__ == "__main__":
    command = Command(name="show_attention", config_type=ShowAttentionConfig, task=show)
    sys.exit(main(command, Path(__file__), Path(__file__).parents[1] / "conf"))
