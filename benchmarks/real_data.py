"""All stages on real data, English and Chinese: they finish, learn, and save what loads.

python benchmarks/real_data.py ../shared/data                  # about ten minutes each
python benchmarks/real_data.py ../shared/data --languages zh

One epoch each, from a base of a million parameters that is trained first. It shows that the stages
run on real text; the text of so small a model is poor.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from trl_instruct import (
    StageResult,
    load_demonstrations,
    load_prompts,
    load_rankings,
    ppo,
    pretrain,
    rankings_to_pairs,
    rm,
    sft,
    split_by_prompt,
)
from trl_instruct.data.records import load_texts

RUNS = Path(__file__).parents[1] / "runs" / "bench"
CONTEXT = 512
LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
ONE_PASS = {
    "use_cpu": True,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,
    "overwrite_output_dir": True,
}


class Language(NamedTuple):
    """The files of one language, and a prompt to try the policy on."""

    demonstrations: str
    rankings: str
    prompts: str
    text: str | None  # None: no corpus; uses the texts of the other files
    question: str


LANGUAGES = {
    "en": Language(
        demonstrations="alpaca_demos_5k",
        rankings="alpacaeval_gpt4judge_rankings_train",
        prompts="ppo_prompts_en_2k",
        text="text_en",
        question="Name a city.",
    ),
    "zh": Language(
        demonstrations="alpaca_zh_demos_5k",
        rankings="oasst_zh_human_rankings",
        prompts="ppo_prompts_zh_1k",
        text=None,
        question="说出一个城市的名字。",
    ),
}


class Data(NamedTuple):
    """The records of one language."""

    texts: Dataset
    demonstrations: Dataset
    rankings: Dataset
    held_out: Dataset
    prompts: Dataset


def load(folder: Path, language: Language) -> Data:
    """Load everything; a tenth of the ranked prompts is held out."""

    def file(name: str) -> Path:
        return folder / f"{name}.jsonl.gz"

    demonstrations = load_demonstrations(file(language.demonstrations)).map(as_line)
    rankings = load_rankings(file(language.rankings)).map(as_line)
    train, test = split_by_prompt(rankings, 0.1)
    if language.text:
        texts = load_texts(file(language.text))
    else:
        said = [row["prompt"] + row["completion"] for row in demonstrations]
        said += [row["prompt"] + r for row in train for r in row["responses"]]
        texts = Dataset.from_dict({"text": said})
    prompts = load_prompts(file(language.prompts)).map(as_line)
    return Data(texts, demonstrations, train, test, prompts)


def as_line(record: dict[str, Any]) -> dict[str, str]:
    """The prompt after its previous turns, if any, with a line end."""
    turns = [text for turn in record.get("history") or [] for text in turn]
    return {"prompt": "\n".join([*turns, record["prompt"]]) + "\n"}


def stages_of(data: Data, folder: Path) -> Iterator[tuple[str, StageResult]]:
    """Base, SFT, RM from rankings and from pairs, PPO, one epoch each, as they end."""
    base = pretrain(
        data.texts,
        folder / "base",
        vocab_size=4096,
        max_length=CONTEXT,
        architecture_kwargs=LLAMA,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        **ONE_PASS,
    )
    yield "base", base
    policy = sft(
        base,
        data.demonstrations,
        folder / "sft",
        max_length=256,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        **ONE_PASS,
    )
    yield "sft", policy
    judged = {
        "eval_dataset": data.held_out,
        "demonstrations": data.demonstrations,
        "max_length": 256,
        "learning_rate": 3e-4,
        **ONE_PASS,
    }
    reward = rm(policy, data.rankings, folder / "rm", per_device_train_batch_size=4, **judged)
    yield "rm", reward
    pairs = rankings_to_pairs(data.rankings)
    yield (
        "rm_pairs",
        rm(policy, pairs, folder / "rm_pairs", per_device_train_batch_size=8, **judged),
    )
    aligned = ppo(
        policy,
        reward,
        data.prompts,
        folder / "ppo",
        max_prompt_length=128,
        response_length=48,
        learning_rate=1e-4,
        kl_coef=0.05,
        num_mini_batches=4,
        per_device_train_batch_size=32,
        **ONE_PASS,
    )
    yield "ppo", aligned


def logged(result: StageResult, key: str) -> list[float]:
    """The values that a stage logged of a metric, in order."""
    state = json.loads((result.path / "trainer_state.json").read_text(encoding="utf-8"))
    return [log[key] for log in state["log_history"] if key in log]


def ends(curve: list[float]) -> tuple[float, float]:
    """Means of the first and last tenth of a curve."""
    tenth = max(1, len(curve) // 10)
    return statistics.fmean(curve[:tenth]), statistics.fmean(curve[-tenth:])


def loads(name: str, folder: Path, question: str) -> str:
    """Load what a stage saved with plain transformers; a score or an answer from it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name.startswith("rm"):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        inputs = tokenizer(question + "\n", return_tensors="pt", return_token_type_ids=False)
        (score,) = model(**inputs).logits[0].tolist()
        if not math.isfinite(score):
            raise SystemExit(f"{folder}: the reward model gives the score {score}")
        return f"{score:.3f}"
    AutoModelForCausalLM.from_pretrained(folder)
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    given = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    return generator(question + "\n", **given)[0]["generated_text"]


def check(name: str, result: StageResult, question: str) -> dict[str, Any]:
    """A stage's results; SystemExit if its loss did not fall or a number is not finite."""
    report = {"metrics": result.metrics, "sample": loads(name, result.path, question)}
    if name == "ppo":
        for label, key in (("score", "objective/scores"), ("kl", "objective/kl")):
            curve = logged(result, key)
            report[label] = {"start": curve[0], "end": curve[-1], "steps": len(curve)}
            if not all(map(math.isfinite, curve)):
                raise SystemExit(f"{name}: {key} is not finite: {curve}")
        return report
    curve = logged(result, "loss")
    start, end = ends(curve)
    report["loss"] = {"start": start, "end": end, "steps": len(curve)}
    if not end < start:
        raise SystemExit(f"{name}: the loss went from {start:.3f} to {end:.3f}; it must fall")
    return report


def measure(code: str, folder: Path) -> dict[str, Any]:
    """Run all stages of one language and check each."""
    language = LANGUAGES[code]
    print(f"\n{code}: loading {', '.join(filter(None, language[:4]))}", flush=True)
    data = load(folder, language)
    counts = {name: len(records) for name, records in data._asdict().items()}
    print(f"{code}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()), flush=True)
    stages, started = {}, time.process_time()
    for name, result in stages_of(data, RUNS / "real_data" / code):
        cpu_seconds = time.process_time() - started
        stages[name] = {**check(name, result, language.question), "cpu_seconds": cpu_seconds}
        started = time.process_time()
    return {"records": counts, "stages": stages}


SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "base": lambda m: f"{m['parameters']:,} parameters",
    "sft": lambda m: f"{m['truncated']} demonstrations cut at max_length",
    "rm": lambda m: f"{m['pairs']:,} pairs, {m['overlong']:,} responses overlong; {accuracy(m)}",
    "rm_pairs": lambda m: f"{m['pairs']:,} pairs, {m['overlong']:,} overlong; {accuracy(m)}",
    "ppo": lambda m: f"{m['cut_prompts']} prompts cut; {m['objective/length']:.1f} tokens",
}


def accuracy(metrics: dict[str, Any]) -> str:
    """Held-out pair accuracy with its interval, beside that of "the longer answer wins"."""
    low, high = metrics["accuracy_low"], metrics["accuracy_high"]
    longer = f"longer wins {metrics['length_accuracy']:.3f}"
    return f"accuracy {metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}], {longer}"


def table(measured: dict[str, Any]) -> str:
    """One row per stage, as Markdown."""
    lines = ["| | stage | steps | what | start | end | CPU s | |", "|---" * 8 + "|"]
    for code, language in measured.items():
        for name, stage in language["stages"].items():
            metrics = stage["metrics"]
            for what in ("loss", "score", "kl"):
                if what in stage:
                    curve = stage[what]
                    cells = [code, name, curve["steps"], what]
                    cells += [f"{curve[end]:.3f}" for end in ("start", "end")]
                    cells += [f"{stage['cpu_seconds']:.0f}", SHOWN[name](metrics)]
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the languages, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the real data")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES))
    arguments = parser.parse_args()
    named = [name for code in arguments.languages for name in LANGUAGES[code][:4] if name]
    absent = [n for n in named if not (arguments.data / f"{n}.jsonl.gz").is_file()]
    if absent:
        print(f"{arguments.data} lacks {', '.join(n + '.jsonl.gz' for n in absent)}: not measured.")
        print("The data are not part of the project; give the folder that holds them.")
        sys.exit(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    measured = {code: measure(code, arguments.data) for code in arguments.languages}
    (RUNS / "real_data.json").write_text(
        json.dumps(measured, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print("\n" + table(measured))
    for code, language in measured.items():
        seconds = sum(stage["cpu_seconds"] for stage in language["stages"].values())
        print(f"{code}: {seconds:.0f} s of processor time; all five folders load and answer")
    print(f"saved: {RUNS / 'real_data.json'}")


if __name__ == "__main__":
    main()
