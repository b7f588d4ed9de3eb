"""Continue a text with a finished run: text on standard output, all else on standard error.

python scripts/generate.py checkpoint=RUN_DIR prompt="def window(" [max_new_tokens=256] [temperature=0.8]
python scripts/generate.py checkpoint=RUN_DIR prompts_file=PROMPTS.jsonl > RESULTS.jsonl
"""

import sys
from dataclasses import fields
from pathlib import Path

from windowlm.command_line import Command, Invocation, main
from windowlm.config import GenerateConfig
from windowlm.generation.config import SamplingConfig, written_texts


def generate(config: GenerateConfig, invocation: Invocation) -> int:
    """Import torch and the rest only once the settings are known to be right."""
    from windowlm.generation.command import generate_from_checkpoint

    generate_from_checkpoint(
        Path(config.checkpoint),
        prompt=config.prompt,
        prompt_file=config.prompt_file,
        prompts_file=config.prompts_file,
        batch_size=config.batch_size,
        settings=SamplingConfig(
            **{
                **{entry.name: getattr(config, entry.name) for entry in fields(SamplingConfig)},
                "stop": written_texts(config.stop),
            }
        ),
        device=config.device,
        precision=config.precision,
        compiled=config.compile,
    )
    return 0


if __name__ == "__main__":
    command = Command(name="generate", config_type=GenerateConfig, task=generate)
    sys.exit(main(command, Path(__file__), Path(__file__).parents[1] / "conf"))
