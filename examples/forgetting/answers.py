"""Which held-out questions a model answers."""

import torch
from cards import questions
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def outcomes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rule: str
) -> dict[str, bool]:
    """Return, for each held-out question, whether the likeliest answer is the right one.

    Right is what greedy decoding would write: of every token of the answer, and of the end after
    it, the model finds none likelier.
    """
    asked = questions(rule, held_out=True)
    texts = [f"{each.prompt}{each.answer}{tokenizer.eos_token}" for each in asked]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    tokens, present = batch["input_ids"], batch["attention_mask"].bool()
    starts = torch.tensor([len(tokenizer(each.prompt)["input_ids"]) for each in asked])
    answered = present & (torch.arange(tokens.shape[1]) >= starts[:, None])
    likeliest = model.eval()(tokens, attention_mask=present.long()).logits[:, :-1].argmax(-1)
    right = ((likeliest == tokens[:, 1:]) | ~answered[:, 1:]).all(dim=1)
    return dict(zip((each.prompt for each in asked), right.tolist(), strict=True))
