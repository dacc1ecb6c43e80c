"""transformers' Trainer trains and evaluates these models as it does its own."""

import pytest
import torch

from fastbert import models
from fastbert.models import BertConfig, GPTConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BERT = BertConfig(
    60, 24, 1, 2, 40, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
GPT = GPTConfig(60, 16, 24, 1, 2, eos_token_id=None)


class Rows(torch.utils.data.Dataset):
    """Rows of unequal lengths, padded; the label is what the first token says."""

    def __init__(self, kind):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 60, (64, 12), generator=generator)
        mask = (torch.arange(12) < torch.randint(3, 13, (64, 1), generator=generator)).long()
        labels = {
            "sequence": (ids[:, 0] % 2),
            "token": (ids % 2).masked_fill(mask == 0, -100),
            "lm": ids.masked_fill(mask == 0, -100),
        }[kind]
        self.rows = [
            {"input_ids": i, "attention_mask": m, "labels": label}
            for i, m, label in zip(ids, mask, labels, strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize(
    "name, config, kind",
    [
        ("BertForSequenceClassification", BERT, "sequence"),
        ("BertForTokenClassification", BERT, "token"),
        ("BertForMaskedLM", BERT, "lm"),
        ("GPTForCausalLM", GPT, "lm"),
    ],
)
def test_trainer(tmp_path, name, config, kind):
    torch.manual_seed(0)
    model = getattr(models, name)(config)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=24,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    seen = {}

    def metrics(prediction):
        seen["logits"] = prediction.predictions
        return {"rows": len(prediction.predictions)}

    trainer = transformers.Trainer(
        model, arguments, train_dataset=Rows(kind), eval_dataset=Rows(kind), compute_metrics=metrics
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rows"] == 64 and after["eval_loss"] < 0.9 * before["eval_loss"]
    assert seen["logits"].shape[0] == 64
