"""Teach a model both rules from nothing: what pretraining is to a real one."""

import torch
from cards import questions
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 64
LEARNING_RATE = 1e-3


def learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, steps: int) -> None:
    """Train `model` in place on questions of both rules, its loss on the answers alone."""
    torch.manual_seed(0)
    asked = [each for rule in ("in", "out") for each in questions(rule, held_out=False)]
    texts = [f"{each.prompt}{each.answer}{tokenizer.eos_token}" for each in asked]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    tokens, present = batch["input_ids"], batch["attention_mask"]
    starts = torch.tensor([len(tokenizer(each.prompt)["input_ids"]) for each in asked])
    answered = (torch.arange(tokens.shape[1]) >= starts[:, None]) & present.bool()
    labels = tokens.where(answered, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(asked), (BATCH_SIZE,))
        loss = model(tokens[rows], attention_mask=present[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"learning both rules: step {step}/{steps}, loss {loss.item():.2f}", flush=True)
