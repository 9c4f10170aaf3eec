"""Movie reviews, continued positively, from scratch: the table in docs/imdb.md.

python benchmarks/imdb_scratch.py ../shared/data        # about seven minutes on one CPU core

The twin of recipes/configs/gpt2-imdb. A small policy is pre-trained on the reviews; a sentiment
classifier with its own tokenizer learns their labels, and PPO optimises the policy against it. A
second classifier, from other reviews and another seed, judges the result and is never trained on:
if only the first judge's score rises, the policy exploits it.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import ModelConfig

from trl_instruct import ClassifierReward, ppo, pretrain
from trl_instruct.configs import EvaluateConfig
from trl_instruct.data.records import load_texts, openings
from trl_instruct.evaluation.measurement import ModelMeasurement, Subject
from trl_instruct.evaluation.measurement import measure as measure_models
from trl_instruct.intervals import Interval, mean_interval, share_interval
from trl_instruct.models.tokenizers import load_tokenizer

RUNS = Path(__file__).parents[1] / "runs" / "bench" / "imdb_scratch"
FILE = "imdb_reviews_5k.jsonl.gz"
OPENING, COMPLETION = 8, 24
SHOWN = 10
COMMON: dict[str, Any] = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "seed": 0}
BASE: dict[str, Any] = {
    "vocab_size": 2048,
    "max_length": 256,
    "architecture_kwargs": {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "num_train_epochs": 2,
}
CLASSIFIER: dict[str, Any] = {
    "dim": 64,
    "hidden_dim": 128,
    "n_layers": 1,
    "n_heads": 2,
    "max_position_embeddings": 512,
    "dropout": 0.2,
    "id2label": {0: "NEGATIVE", 1: "POSITIVE"},
    "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
}
PPO: dict[str, Any] = {
    "opening_length": OPENING,
    "response_length": COMPLETION,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 4,
    "local_rollout_forward_batch_size": 256,
    "total_episodes": 30 * 256,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "kl_coef": 0.2,
    "vf_coef": 0.5,
    "gradient_checkpointing": False,
}


class Reviews(NamedTuple):
    """The reviews in disjoint parts.

    judge, second: for the two classifiers; prompts: PPO continues their openings; test: only for
    measuring.
    """

    judge: Dataset
    second: Dataset
    prompts: Dataset
    test: Dataset


def split(reviews: Dataset) -> Reviews:
    """3/8, 3/8 and 1/4 of the training reviews, rounded down; the test reviews; no text twice."""
    first = {text: row for row, text in reversed(list(enumerate(reviews["text"])))}
    reviews = reviews.select(sorted(first.values()))
    train = reviews.filter(lambda row: row["split"] == "train").shuffle(seed=0)
    part, rest = 3 * len(train) // 8, range(3 * len(train) // 4, len(train))
    return Reviews(
        judge=train.select(range(part)),
        second=train.select(range(part, 2 * part)),
        prompts=train.select(rest),
        test=reviews.filter(lambda row: row["split"] == "test"),
    )


def classifier_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """BPE of lower-case words with [CLS] in front, unlike the policy's byte-level one."""
    core = Tokenizer(models.BPE(unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", special.index("[CLS]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        model_max_length=CLASSIFIER["max_position_embeddings"],
    )


def train_classifier(reviews: Dataset, folder: Path, *, vocab_size: int, seed: int) -> str:
    """Train a small DistilBERT from scratch on whole reviews and their openings; its folder."""
    set_seed(seed)
    tokenizer = classifier_tokenizer(reviews["text"][:], vocab_size)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list]:
        labels = [int(label == "pos") for label in batch["label"]]
        texts = batch["text"] + [text[:160] for text in batch["text"]]
        rows = tokenizer(texts, truncation=True, return_token_type_ids=False)
        return {"input_ids": rows["input_ids"], "labels": labels * 2}

    config = AutoConfig.for_model(
        "distilbert", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **CLASSIFIER
    )
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_config(config),
        args=TrainingArguments(
            str(folder),
            num_train_epochs=4,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            train_sampling_strategy="group_by_length",
            disable_tqdm=True,
            **{**COMMON, "seed": seed},
        ),
        train_dataset=reviews.map(tokenize, batched=True, remove_columns=reviews.column_names),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    trainer.save_model()
    return str(folder)


def positive(folder: str) -> ClassifierReward:
    """The classifier as a reward: log-odds, above 0 for a positive text."""
    return ClassifierReward(folder, "POSITIVE", measure="log_odds")


def accuracy(judge: ClassifierReward, reviews: Dataset, characters: int | None = None) -> Interval:
    """Fraction of the reviews (or their first characters) that the classifier labels correctly."""
    texts = [text[:characters] for text in reviews["text"]]
    scores = judge([""] * len(texts), texts)
    labels = torch.tensor([label == "pos" for label in reviews["label"]])
    return share_interval((torch.tensor(scores) > 0) == labels)


def measure(policies: dict[str, str], test: Dataset, judges: dict) -> dict[str, ModelMeasurement]:
    """One completion of each held-out opening, scored by both classifiers; KL to the first."""
    tokenizer = load_tokenizer(next(iter(policies.values())))
    sizes = {"response_length": COMPLETION, "per_device_eval_batch_size": 256}
    subject = Subject(
        EvaluateConfig(seed=0, **sizes),
        ModelConfig(),
        policies,
        dict.fromkeys(policies, tokenizer),
        openings(test, tokenizer, OPENING),
        one_seed=True,
    )
    return measure_models(subject, judges)[0]


def row(name: str, model: ModelMeasurement) -> dict[str, Any]:
    """The means of one policy, each with its interval."""
    cells: dict[str, Any] = {"policy": name}
    for judge, scores in model.scores.items():
        unit = "compound" if judge == "VADER" else "log-odds"
        cells[f"{judge}, {unit}"] = mean_interval(scores)
        cells[f"{judge}, positive"] = share_interval(torch.tensor(scores) > 0)
    cells["KL, nats"] = mean_interval(model.kl)
    cells["tokens"] = mean_interval([len(completion.ids) for completion in model.sampled])
    return cells


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def cell(value: Any) -> str:
        return value if isinstance(value, str) else "{:.2f} [{:.2f}, {:.2f}]".format(*value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*map(cell, r.values())] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def samples_table(prompts: list[str], before: ModelMeasurement, after: ModelMeasurement) -> str:
    """The first completions of both with the score from PPO's judge, as Markdown."""
    lines = ["| opening | before | after |", "|---|---|---|"]
    for index, prompt in enumerate(prompts):
        told = [
            f"{inert(m.sampled[index].text)} ({m.scores['judge'][index]:+.1f})"
            for m in (before, after)
        ]
        lines.append(f"| {inert(prompt)} | {told[0]} | {told[1]} |")
    return "\n".join(lines)


def inert(text: str) -> str:
    r"""Text as one escaped line of Markdown: reviews and models may write anything.

    >>> inert("a *b* | <br>\nc\x1b")
    'a \\*b\\* \\| \\<br\\> c\\\\x1b'
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return re.sub(r"([\\`*_\[\]<>&|~$#])", r"\\\1", shown)


class Clock:
    """Seconds of processor time of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.process_time()

    def lap(self, name: str) -> None:
        """End the step of that name."""
        now = time.process_time()
        self.seconds[name], self.started = round(now - self.started, 1), now
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)


def run(reviews: Reviews) -> dict[str, Any]:
    """Run all steps and return the measurements."""
    clock = Clock()
    read = [row for part in reviews[:3] for row in part["text"]]
    texts = Dataset.from_dict({"text": read})
    base = pretrain(texts, RUNS / "base", overwrite_output_dir=True, **BASE, **COMMON)
    clock.lap("policy")
    judges, accuracies = {}, {}
    parts = {"judge": (reviews.judge, 3000, 0), "second judge": (reviews.second, 2500, 1)}
    for name, (part, vocab_size, seed) in parts.items():
        folder = RUNS / name.replace(" ", "_")
        judges[name] = positive(train_classifier(part, folder, vocab_size=vocab_size, seed=seed))
        accuracies[name] = {
            "whole reviews": accuracy(judges[name], reviews.test),
            "first 160 characters": accuracy(judges[name], reviews.test, 160),
        }
        print(name, accuracies[name])
        clock.lap(name)
    options = {**PPO, **COMMON, "overwrite_output_dir": True}
    aligned = ppo(base, judges["judge"], reviews.prompts, RUNS / "ppo", **options)
    clock.lap("ppo")
    policies = {"before": str(base), "after": str(aligned)}
    before, after = measure(policies, reviews.test, judges).values()
    clock.lap("measuring")
    shown = openings(reviews.test, load_tokenizer(base.path), OPENING)["prompt"][:SHOWN]
    return {
        "rows": [row("before PPO", before), row("after PPO", after)],
        "samples": samples_table(shown, before, after),
        "accuracy": accuracies,
        "seconds": clock.seconds,
    }


def main() -> None:
    """Run, print and save the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the real data")
    path = parser.parse_args().data / FILE
    if not path.is_file():
        print(f"Missing {path}: not measured. The reviews are not part of the project.")
        sys.exit(1)
    tell(run(split(load_texts(path))), RUNS)


def tell(measured: dict[str, Any], folder: Path) -> None:
    """Save and print what was measured."""
    tables = table(measured["rows"]) + "\n\n" + measured["samples"] + "\n"
    (folder / "imdb.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    (folder / "imdb.md").write_text(tables, encoding="utf-8")
    print("\n" + tables)
    for name, found in measured["accuracy"].items():
        told = ", ".join(f"{on} {m:.3f} [{lo:.3f}, {hi:.3f}]" for on, (m, lo, hi) in found.items())
        print(f"accuracy of the {name} on held-out reviews: {told}")
    print(f"seconds of processor time: {measured['seconds']}")


if __name__ == "__main__":
    main()
