"""Measure the perplexity of a finished run against context length, and what averages hide.

python scripts/evaluate.py checkpoint=RUN_DIR [data.path=TEXT] [evaluation.context_lengths=[256,512,1024]]
    [study.measures=[far_repeats,pasted_spans,forced_choice,far_context,reach,useful_reach]] [devices=2]
"""

import sys
from pathlib import Path

from windowlm.command_line import Command, Invocation, main
from windowlm.config import EvaluateConfig
from windowlm.evaluation.own_settings import with_own_settings

SAVED = "what has been scored is kept, and the same command goes on"


def evaluate(config: EvaluateConfig, invocation: Invocation) -> int:
    """Import torch and the rest only once the settings are known to be right."""
    from windowlm.evaluation.evaluate import evaluate_checkpoint
    from windowlm.parallel.processes import Processes, ending_together
    from windowlm.study.run_study import check_measures, run_study

    processes = Processes.join()
    with ending_together(processes, SAVED):
        if config.wandb:
            from windowlm.training.finished_wandb_run import check_wandb_run

            processes.leader_alone(lambda: check_wandb_run(Path(config.checkpoint)))
        check_measures(Path(config.checkpoint), config.study)
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
            if config.wandb:
                log_evaluations(Path(config.checkpoint))
    return 0


def log_evaluations(run: Path) -> None:
    """Log every evaluation of a run to its W&B run, and say how an offline one is uploaded."""
    from windowlm.evaluation.result_files import OWN_EVALUATION, PLOT_NAME, RESULT_NAME, read_result
    from windowlm.study.measure_files import STUDY_FOLDER, measures_of
    from windowlm.training.finished_wandb_run import end_wandb_run, open_wandb_run

    wandb_run = open_wandb_run(run)
    for folder in sorted(path.parent for path in run.glob(f"{OWN_EVALUATION}*/{RESULT_NAME}")):
        result = read_result(run, folder.name)
        wandb_run.log_length(result, folder / PLOT_NAME, folder.name)
        for measured in measures_of(folder, result):
            plot = folder / STUDY_FOLDER / f"{measured['measure']}.png"
            wandb_run.log_table(f"{folder.name}/{measured['measure']}", measured["rows"], plot)
    end_wandb_run(wandb_run, run)
    if (command := wandb_run.sync_command()) is not None:
        print(command)


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
