"""Whether a release changed what lies beside its weights: configs, tokenizer, chat template."""
