"""PEFT adapters, opened on the base they were trained for."""
