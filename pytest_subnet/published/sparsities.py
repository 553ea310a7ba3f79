"""Published sparsities of updates."""

from __future__ import annotations

from pytest_subnet.published.rows import (
    DISTILLATION,
    PATH_NOT_TAKEN,
    RL_SUBNETWORKS,
    PublishedSparsity,
)
from pytest_subnet.scan.tolerance import PAPER, SAME_BITS, Tolerance

_BF16 = "bfloat16"
_NAME_ONLY = "the paper prints the base without its organisation"
_NAMES_ONLY = "the paper prints both names without their organisation"
_MISLABELLED = (
    "mislabelled: it is the 86.52% of Llama-3-Base-8B-SFT-SimPO in Table 6, where "
    "Llama-3-Instruct-8B-SimPO has 76.42%"
)
_PRIME_BASE = (
    "the paper also calls the base Qwen2.5-Math-7B (appendix B) and Eurus-7b-sft (appendix D)"
)

# algorithm, base, tuned, sparsity in percent, note
_TABLE_1 = (
    ("DPO", "allenai/Llama-3.1-Tulu-3-8B-SFT", "allenai/Llama-3.1-Tulu-3-8B-DPO", 81.4, ""),
    ("DPO", "allenai/Llama-3.1-Tulu-3-70B-SFT", "allenai/Llama-3.1-Tulu-3-70B-DPO", 95.2, ""),
    (
        "GRPO",
        "deepseek-ai/deepseek-math-7b-instruct",
        "deepseek-ai/deepseek-math-7b-rl",
        68.5,
        "",
    ),
    (
        "GRPO",
        "deepseek-ai/DeepSeek-V3-Base",
        "deepseek-ai/DeepSeek-R1-Zero",
        86.0,
        "not in Table 6; the authors' notebook loads both in 8 bits, so it may describe quantised "
        "weights",
    ),
    ("ORPO", "mistralai/Mistral-7B-v0.1", "kaist-ai/mistral-orpo-beta", 76.9, _NAME_ONLY),
    ("KTO", "openbmb/Eurus-7b-sft", "openbmb/Eurus-7b-kto", 96.0, _NAME_ONLY),
    (
        "KTO",
        "princeton-nlp/Llama-3-Base-8B-SFT",
        "princeton-nlp/Llama-3-Base-8B-SFT-KTO",
        81.2,
        f"not in Table 6; {_NAMES_ONLY}",
    ),
    ("PPO", "peiyi9979/mistral-7b-sft", "peiyi9979/math-shepherd-mistral-7b-rl", 80.8, _NAME_ONLY),
    (
        "SimPO",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "princeton-nlp/Llama-3-Instruct-8B-SimPO",
        86.5,
        _MISLABELLED,
    ),
    ("PRIME", "PRIME-RL/Eurus-2-7B-SFT", "PRIME-RL/Eurus-2-7B-PRIME", 77.0, _PRIME_BASE),
)

_TABLE_6_TOLERANCES = (
    Tolerance(atol=1e-8),
    Tolerance(atol=1e-7),
    Tolerance(atol=1e-6),
    PAPER,
)
# algorithm, tuned, sparsity in percent under each of these, note
_TABLE_6 = (
    ("DPO", "allenai/Llama-3.1-Tulu-3-8B-DPO", (76.04, 76.04, 76.14, 81.38), ""),
    ("DPO", "allenai/Llama-3.1-Tulu-3-70B-DPO", (87.58, 87.59, 87.79, 95.24), ""),
    ("GRPO", "deepseek-ai/deepseek-math-7b-rl", (68.14, 68.14, 68.14, 68.53), ""),
    ("ORPO", "kaist-ai/mistral-orpo-beta", (73.16, 73.18, 73.23, 76.94), ""),
    (
        "ORPO",
        "kaist-ai/mistral-orpo-alpha",
        (50.40, 50.41, 50.48, 53.23),
        "below the 'at least 68.5%' of the paper's text",
    ),
    ("KTO", "openbmb/Eurus-7b-kto", (71.78, 71.79, 73.14, 95.98), ""),
    ("PPO", "peiyi9979/math-shepherd-mistral-7b-rl", (52.45, 52.47, 53.21, 80.77), ""),
    ("PRIME", "PRIME-RL/Eurus-2-7B-PRIME", (75.26, 75.27, 75.36, 77.04), "the table says PPO"),
    ("SimPO", "princeton-nlp/Llama-3-Instruct-8B-SimPO", (71.00, 71.00, 71.10, 76.42), ""),
    ("SimPO", "princeton-nlp/Llama-3-Base-8B-SFT-SimPO", (79.47, 79.47, 79.60, 86.52), ""),
    ("SimPO", "princeton-nlp/Mistral-7B-Instruct-SimPO", (59.37, 59.40, 60.31, 89.07), ""),
    ("SimPO", "princeton-nlp/Mistral-7B-Base-SFT-SimPO", (62.58, 62.60, 63.56, 91.44), ""),
)

_TULU, _EURUS = "allenai/Llama-3.1-Tulu-3-8B-SFT", "PRIME-RL/Eurus-2-7B-SFT"
_OWN_DPO = "trained by the authors, batch 32, one epoch; 81.4% for the released model, batch 128"
_IN, _OUT = "in-distribution data", "out-of-distribution data"
_SFT_AND_DPO = f"{_OUT}; Table 5 gives 6.8% to SFT and to DPO of this model"

# table, algorithm, base, tuned, tolerance, sparsity in percent, note
_OTHERS = (
    ("Table 4", "DPO", _TULU, "", PAPER, 63.3, f"Tulu data; {_OWN_DPO}"),
    ("Table 4", "DPO", _TULU, "", PAPER, 85.4, "PRIME's data; trained by the authors, batch 32"),
    ("Table 4", "DPO", _EURUS, "", PAPER, 87.1, "trained by the authors"),
    ("Table 5", "RFT", "", "Qwen2.5-Math-7B", PAPER, 91.2, f"{_IN}; the text says about 90.0%"),
    ("text", "RFT", "", "Qwen2.5-Math-7B", PAPER, 90.0, f"{_IN}; Table 5 says 91.2%"),
    ("Table 5", "RAFT++", "", "Qwen2.5-Math-7B", PAPER, 69.4, _IN),
    ("Table 5", "SFT", "", "Llama-3.1-8B-SFT", PAPER, 6.8, _SFT_AND_DPO),
    ("Table 5", "DPO", "", "Llama-3.1-8B-SFT", PAPER, 6.8, _SFT_AND_DPO),
    ("Table 5", "DPO", "", "Zephyr-7b-Beta", PAPER, 7.7, f"{_OUT}; the text says 6.8%"),
    ("text", "DPO", "", "Zephyr-7b-Beta", PAPER, 6.8, f"{_OUT}; Table 5 says 7.7%"),
    ("Table 5", "DPO", "", "Llama-3.1-8B-DPO", PAPER, 81.4, f"{_IN}; the 81.4% of Table 1"),
    ("text", "GRPO", "Qwen2.5-7B-Instruct", "", PAPER, 69.8, "with the KL term"),
    ("text", "GRPO", "Qwen2.5-7B-Instruct", "", PAPER, 68.8, "without the KL term"),
    (
        "authors' notebook",
        "SFT",
        "",
        "",
        SAME_BITS,
        59.94,
        "learning rate 5e-7, 2,000 steps; 13.1% of the model was left out; +0 and -0 count as one",
    ),
    (
        "authors' notebook",
        "SFT",
        "",
        "",
        PAPER,
        63.10,
        "learning rate 5e-7, 2,000 steps; 13.1% of the model was left out",
    ),
)

_RELATIVE = Tolerance(rtol=1e-3)
_R1_1B = "DS-R1-Distill-Qwen-1.5B"
_SWAPPED = "2606.07082 gives 79.0% to GT-Qwen3-8B and 79.9% to Polaris-4B: one looks swapped"

# algorithm, base, tuned, sparsity in percent, note
_PATH_NOT_TAKEN = (
    ("SFT", "Qwen-1.5B", _R1_1B, 2.8, ""),
    ("SFT", "Qwen3-8B-Base", "Klear-Reasoner-8B-SFT", 0.6, ""),
    ("SFT", "Qwen3-14B-Base", "UniReason-14B-think-SFT", 18.8, ""),
    ("RLVR", _R1_1B, "DeepScaleR", 53.8, ""),
    ("RLVR", _R1_1B, "DeepCoder", 45.5, ""),
    ("RLVR", _R1_1B, "Archer-Code", 52.5, ""),
    ("RLVR", _R1_1B, "NV-ProRL", 38.4, "prolonged RL"),
    ("RLVR", _R1_1B, "ProRL-v2", 36.3, "prolonged RL"),
    ("RLVR", "", "Klear-Reasoner-8B", 69.5, "2606.07082 gives 69.9%"),
    ("RLVR", "", "GT-Qwen3-8B-Base", 79.9, _SWAPPED),
    ("DAPO", "Qwen3-8B-Base", "", 79.7, "trained by the authors"),
    ("RLVR", "", "UniReason-14B-RL", 68.3, ""),
    ("RLVR", "", "Polaris-4B", 79.3, _SWAPPED),
    ("RLVR", "", "Polaris-7B", 61.7, ""),
    ("RLVR", "", "UloRL-A3B", 91.7, "30B mixture of experts"),
)

_APART = "its density and sparsity do not add up to 100%: taken over other parameters"
_AGAIN = "measured again by the authors"
_VARIANT = "a variant of OPD"

# algorithm, base, tuned, sparsity in percent, note
_DISTILLATION = (
    ("SFT", "Qwen3-8B", "", 8.1, f"controlled comparison; {_APART}"),
    ("OPD", "Qwen3-8B", "", 51.6, f"controlled comparison; {_APART}"),
    ("GRPO", "Qwen3-8B", "", 77.2, f"controlled comparison; {_APART}"),
    ("OPD", "", "4B-T8B", 50.3, _VARIANT),
    ("OPD", "", "4B-T14B", 51.1, _VARIANT),
    ("OPD", "", "4B-T32B", 51.7, _VARIANT),
    ("OPD", "", "14B-T32B", 56.6, _VARIANT),
    ("OPD", "", "code", 57.1, _VARIANT),
    ("OPD", "", "MoE teacher", 48.6, _VARIANT),
    ("SFT", "", "Klear-Reasoner-8B-SFT", 0.6, _AGAIN),
    ("SFT", "", "UniReason-14B-think-SFT", 18.8, _AGAIN),
    ("RLVR", "", "Klear-Reasoner-8B", 69.9, f"{_AGAIN}; 2511.08567 gives 69.5%"),
    ("RLVR", "", "GT-Qwen3-8B-Base", 79.0, f"{_AGAIN}; 2511.08567 gives 79.9%, and 79.3% next"),
    ("RLVR", "", "Polaris-4B", 79.9, f"{_AGAIN}; 2511.08567 gives 79.3%, and 79.9% before"),
)


def _fraction(percent: float) -> float:
    return round(percent / 100, 6)


def _rows() -> list[PublishedSparsity]:
    rows = [
        PublishedSparsity(
            RL_SUBNETWORKS, "Table 1", algorithm, base, tuned, PAPER, _BF16, _fraction(value), note
        )
        for algorithm, base, tuned, value, note in _TABLE_1
    ]
    bases = {tuned: base for _, base, tuned, _, _ in _TABLE_1}
    rows += [
        PublishedSparsity(
            RL_SUBNETWORKS,
            "Table 6",
            algorithm,
            bases.get(tuned, ""),
            tuned,
            tolerance,
            _BF16,
            _fraction(value),
            note,
        )
        for algorithm, tuned, values, note in _TABLE_6
        for tolerance, value in zip(_TABLE_6_TOLERANCES, values, strict=True)
    ]
    rows += [
        PublishedSparsity(
            RL_SUBNETWORKS, table, algorithm, base, tuned, tolerance, _BF16, _fraction(value), note
        )
        for table, algorithm, base, tuned, tolerance, value, note in _OTHERS
    ]
    rows += [
        PublishedSparsity(
            PATH_NOT_TAKEN,
            "Tables 1 and 2",
            algorithm,
            base,
            tuned,
            _RELATIVE,
            _BF16,
            _fraction(value),
            note,
        )
        for algorithm, base, tuned, value, note in _PATH_NOT_TAKEN
    ]
    rows += [
        PublishedSparsity(
            DISTILLATION, "tables", algorithm, base, tuned, None, "", _fraction(value), note
        )
        for algorithm, base, tuned, value, note in _DISTILLATION
    ]
    return rows


SPARSITIES: tuple[PublishedSparsity, ...] = tuple(_rows())
"""Every published sparsity of an update, in the order of the papers."""
