"""What is measured and sampled, in one process or several: python tests/shared_work.py FOLDER.

torchrun --nproc_per_node 2 tests/shared_work.py FOLDER. Writes FOLDER/<processes>/found.json and,
of each process, how many completions its judge has read.
"""

import os
import sys
from pathlib import Path

import yaml
from accelerate import PartialState
from conftest import byte_tokenizer, letters, tiny_model
from datasets import Dataset
from trl import ModelConfig

from trl_instruct.configs import CandidatesConfig
from trl_instruct.evaluation.compare import compare
from trl_instruct.evaluation.evaluate import evaluate
from trl_instruct.files import write_json
from trl_instruct.recipes.candidates import candidates
from trl_instruct.recipes.rm import rm

QUICK = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
# So cold that a completion is the same whatever random number draws it.
SAMPLED = {**QUICK, "response_length": 5, "temperature": 1e-3, "per_device_eval_batch_size": 2}
PROMPTS = [f"Q{'x' * row}: " for row in range(5)]  # two processes cannot share them evenly
DEMONSTRATIONS = [{"prompt": p, "completion": p[::-1] * 2} for p in PROMPTS[:3]]
RANKINGS = [
    {"prompt": prompt, "responses": [*"abcde"[: 2 + row % 4]], "ranks": [*range(1, 3 + row % 4)]}
    for row, prompt in enumerate(PROMPTS)
]


def saved(folder, stage=None, **options):
    """The folder of a tiny model, if asked for as a stage leaves it."""
    tiny_model(**options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if stage:
        config = {"model_name_or_path": str(folder.parent / "sft"), **SAMPLED}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        write_json(folder / "metrics.json", {"stage": stage, "seconds": 1.0})
    return str(folder)


def main(folder):
    processes = PartialState(cpu=True)
    folder = folder / str(processes.num_processes)
    if processes.is_main_process:
        saved(folder / "sft")
        saved(folder / "ppo", "ppo", seed=2)
        saved(folder / "reward", seed=1, classifier=True)
        write_json(folder / "prompts.json", [{"prompt": prompt} for prompt in PROMPTS])
    processes.wait_for_everyone()
    policy, prompts, seen = str(folder / "sft"), str(folder / "prompts.json"), []

    def judge(prompts, completions):
        seen.extend(completions)
        return letters(prompts, completions)

    models, shown = {"sft": policy, "ppo": str(folder / "ppo")}, Dataset.from_list(DEMONSTRATIONS)
    given = {"judges": {"letters": judge}, "demonstrations": shown, "best_of_n": 2}
    evaluation = evaluate(models, prompts, folder / "evaluation", **given, **SAMPLED).metrics
    write_json(folder / f"read-{processes.process_index}.json", len(seen))
    sources = {"reward": str(folder / "reward"), "eval_dataset": prompts}
    summary = compare(folder / "ppo", **sources, summary_file=folder / "summary.json")
    several = {**SAMPLED, "temperature": 1.0, "dataset_name": prompts, "num_candidates": 3}
    drawn = CandidatesConfig(output_dir=str(folder / "candidates"), **several)
    counts = candidates(drawn, ModelConfig(policy)).metrics
    options = {**QUICK, "learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 1}
    rankings = Dataset.from_list(RANKINGS)
    given = {"eval_dataset": rankings, "demonstrations": shown, "bf16": False, **options}
    ranked = rm(policy, rankings, folder / "rm", **given).metrics
    if processes.is_main_process:
        found = {"evaluation": evaluation, "summary": summary, "candidates": counts, "rm": ranked}
        write_json(folder / "found.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in processes.py
