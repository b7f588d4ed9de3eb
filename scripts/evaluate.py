"""Measure the perplexity of a finished run against context length, and what averages hide.

python scripts/evaluate.py checkpoint=RUN_DIR [data.path=TEXT] [evaluation.context_lengths=[256,512,1024]]
    [study.measures=[far_repeats,pasted_spans,forced_choice,far_context,reach,useful_reach]] [devices=2]
"""

import sys
from pathlib import Path

from windowlm.command_line import Command, Invocation, main
from windowlm.config import EvaluateConfig
from windowlm.evaluation.own_settings import with_own_settings

SAVED = "what is scored is kept, and the same command goes on"


def evaluate(config: EvaluateConfig, invocation: Invocation) -> int:
    """Import torch and the rest only once the settings are known to be right."""
    from windowlm.evaluation.evaluate import evaluate_checkpoint
    from windowlm.parallel.processes import Processes, ending_together
    from windowlm.study.run_study import run_study

    processes = Processes.join()
    with ending_together(processes, SAVED):
        evaluated = evaluate_checkpoint(
            Path(config.checkpoint),
            data=config.data.given(),
            evaluation=config.evaluation,
            device=config.device,
            output_dir=None if config.output_dir is None else Path(config.output_dir),
            processes=processes,
        )
        if processes.leads:
            run_study(evaluated, config.study)
    return 0


if __name__ == "__main__":
    command = Command(
        name="evaluate",
        config_type=EvaluateConfig,
        task=evaluate,
        complete=with_own_settings,
        devices="devices",
        saved=SAVED,
    )
    sys.exit(main(command, Path(__file__), Path(__file__).parents[1] / "conf"))
