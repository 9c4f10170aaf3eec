"""Movie reviews, continued positively, by SmolLM2-135M: the first table in docs/imdb.md.

python benchmarks/imdb.py ../shared/data        # 21 minutes on two CPU cores

The policy, LoRA over frozen weights, is fine-tuned on openings of reviews and how they go on. A
classifier over MiniLM learns the reviews' labels; PPO optimises the policy against it. Two judges
are never trained on: a second classifier, from other reviews and another seed, and VADER, a
lexicon. The models come from `make weights`; imdb_scratch.py is the same without them. `--dtype
bfloat16` took as long as float32 on a processor with AMX; on one without, it takes twice as long.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from imdb_scratch import (
    FILE,
    SHOWN,
    Clock,
    Reviews,
    accuracy,
    positive,
    row,
    samples_table,
    split,
    tell,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import ModelConfig

from trl_instruct import ppo, sft
from trl_instruct.configs import EvaluateConfig
from trl_instruct.data.records import load_texts, openings
from trl_instruct.evaluation.measurement import Subject, measure
from trl_instruct.intervals import Interval, plot_intervals
from trl_instruct.models.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench" / "imdb"
WEIGHTS = ROOT / "runs" / "weights"
MODEL = str(WEIGHTS / "smollm2-135m")
COMMON: dict[str, Any] = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "seed": 0}
OPENING, COMPLETION = 8, 24
SIZES: dict[str, Any] = {"response_length": COMPLETION, "seed": 0}
# Of both stages of the policy.
POLICY: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": "all-linear",
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "overwrite_output_dir": True,
}
SFT: dict[str, Any] = {"num_train_epochs": 1, "learning_rate": 4e-4, "warmup_steps": 5}
PPO: dict[str, Any] = {
    "opening_length": OPENING,
    "response_length": COMPLETION,
    "num_mini_batches": 4,
    "local_rollout_forward_batch_size": 64,
    "total_episodes": 22 * 64,
    "learning_rate": 5e-4,
    "warmup_steps": 2,
    "kl_coef": 0.16,
}
CLASSIFIER: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
}
# What a classifier reads of each review: about as much as PPO shows it.
CHARACTERS = 160


def continued(reviews: Dataset, tokenizer: Any) -> Dataset:
    """Demonstrations: openings as PPO's, and the next 64 tokens of the review."""
    rows = tokenizer(reviews["text"][:], add_special_tokens=False)["input_ids"]
    completions = tokenizer.batch_decode([row[OPENING:][:64] for row in rows])
    return Dataset.from_dict(
        {"prompt": openings(reviews, tokenizer, OPENING)["prompt"], "completion": completions}
    )


def train_classifier(reviews: Dataset, folder: Path, *, seed: int, **options: Any) -> str:
    """Fine-tune MiniLM on the labels of the reviews' beginnings; its folder."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "minilm")
    labels = {"NEGATIVE": 0, "POSITIVE": 1}
    model = AutoModelForSequenceClassification.from_pretrained(
        WEIGHTS / "minilm", id2label={v: k for k, v in labels.items()}, label2id=labels
    )

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list]:
        rows = tokenizer([text[:CHARACTERS] for text in batch["text"]])
        return {**rows, "labels": [int(label == "pos") for label in batch["label"]]}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(folder), **{**CLASSIFIER, **COMMON, **options, "seed": seed}),
        train_dataset=reviews.map(tokenize, batched=True, remove_columns=reviews.column_names),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    trainer.save_model()
    return str(folder)


class Vader:
    """VADER's compound score of what the policy wrote, -1 to 1 (Hutto and Gilbert 2014)."""

    def __init__(self, folder: Path):
        spec: Any = importlib.util.spec_from_file_location("vader", folder / "vaderSentiment.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.analyzer = module.SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        return [self.analyzer.polarity_scores(text)["compound"] for text in completions]


def run(reviews: Reviews, dtype: str = "float32") -> dict[str, Any]:
    """Train the policy and the classifiers; the measurements on held-out openings."""
    clock = Clock()
    tokenizer = load_tokenizer(MODEL)
    demonstrations = continued(reviews.prompts, tokenizer)
    options = {**COMMON, **POLICY, "dtype": dtype}
    policy = str(sft(MODEL, demonstrations, RUNS / "sft", **{**SFT, **options}))
    clock.lap("sft")
    judges: dict[str, Any] = {}
    for seed, (name, part) in enumerate(zip(("judge", "second judge"), reviews[:2], strict=True)):
        judges[name] = positive(
            train_classifier(
                part, RUNS / name.replace(" ", "_"), seed=seed, bf16=dtype == "bfloat16"
            )
        )
        clock.lap(name)
    accuracies = {
        name: {
            "first 300 characters": accuracy(judge, reviews.test, 300),
            "first 160 characters": accuracy(judge, reviews.test, CHARACTERS),
        }
        for name, judge in judges.items()
    }
    judges["VADER"] = Vader(WEIGHTS / "vader")
    aligned = ppo(policy, judges["judge"], reviews.prompts, RUNS / "ppo", **{**PPO, **options})
    clock.lap("ppo")
    policies = {"before": policy, "after": str(aligned)}
    prompts = openings(reviews.test, tokenizer, OPENING)
    subject = Subject(
        EvaluateConfig(per_device_eval_batch_size=128, **SIZES),
        ModelConfig(dtype=dtype),
        policies,
        dict.fromkeys(policies, tokenizer),
        prompts,
        one_seed=True,
    )
    before, after = measure(subject, judges)[0].values()
    clock.lap("measuring")
    return {
        "rows": [row("before PPO", before), row("after PPO", after)],
        "samples": samples_table(prompts["prompt"][:SHOWN], before, after),
        "accuracy": accuracies,
        "seconds": clock.seconds,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Shares of positive continuations before and after PPO, by judge, with their intervals."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 3), layout="constrained").subplots()
    names = {"judge": "judge (PPO's reward)", "second judge": "second judge", "VADER": "VADER"}
    for side, policy in enumerate(rows):
        shares = {
            shown: Interval(*policy[f"{name}, positive"])._asdict() for name, shown in names.items()
        }
        plot_intervals(axes, shares, offset=(side - 0.5) / 5, label=policy["policy"])
    axes.set(ylim=(0, 1), ylabel="judged positive (95 %)")
    axes.legend(loc="lower right")
    axes.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Run, print and save the tables and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the real data")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    path = given.data / FILE
    for needed, how in ((path, "The reviews are not part of it"), (WEIGHTS, "Run make weights")):
        if not needed.exists():
            print(f"Missing {needed}: not measured. {how}.")
            sys.exit(1)
    measured = run(split(load_texts(path)), given.dtype)
    tell(measured, RUNS)
    plot(measured["rows"], RUNS / "imdb.svg")


if __name__ == "__main__":
    main()
